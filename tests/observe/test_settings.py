from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from moetrain.settings import ObserveSettings, WandbSettings


def _composed(given: dict[str, Any]) -> ObserveSettings:
    schema = OmegaConf.structured(ObserveSettings)
    OmegaConf.set_readonly(schema, None)  # frozen classes make read-only nodes
    OmegaConf.set_readonly(schema.wandb, None)
    settings = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert isinstance(settings, ObserveSettings)
    return settings


def test_omegaconf_digests_the_schema_and_gives_the_settings_back() -> None:
    given = {"log_every_steps": 3, "wandb": {"project": "mine"}}
    assert _composed(given) == ObserveSettings(
        log_every_steps=3, wandb=WandbSettings(project="mine")
    )


@pytest.mark.parametrize(
    ("written", "meant"), [(True, "auto"), (False, "off"), ("true", "auto"), ("lines", "lines")]
)
def test_progress_may_be_switched_like_a_boolean(written: object, meant: str) -> None:
    assert _composed({"progress": written}).progress == meant


def test_an_unknown_choice_names_value_choices_and_the_nearest() -> None:
    with pytest.raises(ValidationError) as error:
        WandbSettings(mode="ofline")
    assert all(word in str(error.value) for word in ("ofline", "online, disabled", "'offline'"))


def test_unknown_keys_and_impossible_intervals_are_refused() -> None:
    with pytest.raises(ValidationError, match="log_every"):
        ObserveSettings(log_every=3)  # type: ignore[call-arg]  # which is tested
    with pytest.raises(ValidationError, match="log_every_steps"):
        ObserveSettings(log_every_steps=0)
