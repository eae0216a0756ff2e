"""The model card of an export: README.md, filled in from the run's own files.

Owns the text and the source of each figure. Facts that no file records are left out, or marked as
unknown. Leaves the tokenizer and the weights to others.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from moetrain.checkpoint.manifest import Manifest
from moetrain.huggingface.families import family_of
from moetrain.huggingface.markdown import fenced, line, table
from moetrain.huggingface.run_facts import RunFacts, Source, read_facts
from moetrain.model import active_parameters, total_parameters
from moetrain.settings import Resolved

UNKNOWN = "unknown"
# The Hub's names of licences that shards name by SPDX; any other is `other` there.
_LICENCES = frozenset(
    {
        *(
            "apache-2.0",
            "mit",
            "mpl-2.0",
            "isc",
            "zlib",
            "bsd-2-clause",
            "bsd-3-clause",
            "unlicense",
        ),
        *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "odc-by", "odbl", "pddl", "gfdl"),
        *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0"),
    }
)


def write_model_card(
    to: Path,
    *,
    run_dir: Path,
    manifest: Manifest,
    config: Resolved,
    dtype: str,
    has_tokenizer: bool = True,
    begins_texts: bool = False,
) -> None:
    """Writes README.md into a folder that is there, for a checkpoint of a run.

    `manifest` and `config` are the checkpoint's, `dtype` is that of the exported weights, and
    `begins_texts` says whether the tokenizer puts the end-of-document token first. Figures are of
    the checkpoint's step or the last before it at which they were taken.
    """
    facts = read_facts(run_dir, manifest=manifest, config=config)
    name = line(config.run.name or run_dir.name)
    parts = [
        f"# {name}",
        _introduction(facts, config, dtype=dtype),
        _how_to_load(facts, dtype, has_tokenizer=has_tokenizer, begins_texts=begins_texts),
        "## Architecture",
        _architecture(config),
        "## Training text",
        *_training_text(facts),
        "## Training",
        *_training(facts, config),
        *_loss(facts),
        *_router(facts),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(facts, config)),
        _configuration(manifest.config),
    ]
    text = "\n\n".join([_front_matter(facts, config), *parts]) + "\n"
    (to / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def _front_matter(facts: RunFacts, config: Resolved) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    languages = sorted({s.language for s in facts.sources if s.language})
    if known := [code for code in languages if re.fullmatch(r"[a-z]{2,3}", code)]:
        fields["language"] = known
    if licence := _one_licence(facts.sources):
        hub = licence.lower()
        fields["license"] = hub if hub in _LICENCES else "other"
        if hub not in _LICENCES:
            fields["license_name"] = re.sub(r"[^a-z0-9.-]+", "-", hub).strip("-") or UNKNOWN
    fields["tags"] = [
        family_of(config.model).model_type,
        *(["moe"] if config.model.is_moe else []),
        "moetrain",
    ]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _one_licence(sources: Iterable[Source]) -> str | None:
    """The licence of all text trained on, if it is one and the same and known of each."""
    licences = {source.licence for source in sources}
    return licences.pop() if len(licences) == 1 else None


def _introduction(facts: RunFacts, config: Resolved, *, dtype: str) -> str:
    model = config.model
    total, active = total_parameters(model), active_parameters(model)
    architecture = family_of(model).architecture
    if model.is_moe:
        kind = f"Mixture-of-Experts language model ({architecture} in transformers)"
        size = f"{_short(total)} parameters, of which a token meets {_short(active)}"
    else:
        kind, size = (
            f"dense language model ({architecture} in transformers)",
            f"{_short(total)} parameters",
        )
    trained = (
        f"trained with moetrain on {facts.tokens:,} tokens"
        if facts.tokens
        else "not trained in this run yet"
    )
    text = f"A {kind} with {size}, {trained}. Weights are in {dtype}."
    return " ".join([text, *map(line, facts.origins)])


def _how_to_load(facts: RunFacts, dtype: str, *, has_tokenizer: bool, begins_texts: bool) -> str:
    if not has_tokenizer:
        return (
            "## How to load it\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")  # this folder\n'
            "```\n\nThe folder has no tokenizer: which one the model was trained with is for you "
            "to know."
        )
    text = (
        "## How to load it\n\n```python\nfrom transformers import AutoModelForCausalLM, "
        'AutoTokenizer\n\nfolder = "."  # this one\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="{dtype}")\n'
        'inputs = tokenizer("The beginning of a text", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n\n"
        "It is given the beginning of a text and continues it."
    )
    if facts.tokens:
        text += (
            " In moetrain's training the end-of-document token, and no other, stood before each "
            "document"
            + (
                ", and the tokenizer puts it before each text."
                if begins_texts
                else ". The tokenizer, which is the imported model's, begins texts as that did."
            )
        )
    return text


def _architecture(config: Resolved) -> str:
    model = config.model
    rows: dict[str, object] = {
        "parameters": f"{total_parameters(model):,}",
        "active parameters a token": f"{active_parameters(model):,}",
        "layers": model.num_layers,
        "dimension": model.dim,
        "attention heads": f"{model.num_heads} of {model.head_dim}, {model.num_kv_heads} for keys "
        "and values",
        "hidden dimension of an expert" if model.is_moe else "hidden dimension": (
            model.ffn_hidden_dim
        ),
    }
    if model.is_moe:
        rows["experts a layer"] = f"{model.num_experts}, of which a token takes {model.top_k}"
    if model.num_shared_experts:
        rows["shared experts a layer"] = model.num_shared_experts
    if model.num_dense_layers:
        rows["layers without a router"] = model.num_dense_layers
    rows |= {
        "vocabulary": model.vocab_size,
        "longest sequence": model.max_seq_len,
        "base of rotary positions": f"{model.rope_theta:g}",
    }
    if (scaling := model.rope_scaling).type != "none":
        rows["scaling of rotary positions"] = f"{scaling.type}, factor {scaling.factor:g}"
    return table(["", ""], rows.items())


def _training_text(facts: RunFacts) -> Iterator[str]:
    if not facts.sources:
        yield "Which text the model was trained on is not recorded in this run."
        return
    total = sum(source.tokens for source in facts.sources)
    yield table(
        ["source", "text", "licence", "tokens trained on", "share", "epochs"],
        (
            (
                source.name,
                source.text or UNKNOWN,
                source.licence or UNKNOWN,
                f"{source.tokens:,}",
                f"{source.tokens / total:.1%}" if total else UNKNOWN,
                UNKNOWN if source.epochs is None else f"{source.epochs:.3g}",
            )
            for source in facts.sources
        ),
    )
    notes = []
    if facts.shards_unknown:
        notes.append(f"The shards could not be read for this card: {facts.shards_unknown}.")
    if facts.corrupt_sequences:
        notes.append(
            f"{facts.corrupt_sequences:,} sequences were left out because of damaged documents."
        )
    if licence := _one_licence(facts.sources):
        notes.append(
            f"The card names {line(licence)}, the licence of all of this text; what that means "
            "for the weights is for whoever uses them to judge."
        )
    if notes:
        yield " ".join(notes)


def _training(facts: RunFacts, config: Resolved) -> Iterator[str]:
    train, optim, schedule = config.train, config.optim, config.schedule
    rows: dict[str, object] = {
        "steps": f"{facts.step:,} of {train.num_steps:,}",
        "tokens": f"{facts.tokens:,}",
        "batch": f"{train.global_batch_size:,} sequences of {train.seq_len:,} tokens",
    }
    if facts.skipped:
        rows["steps skipped for a non-finite loss or gradient"] = facts.skipped
    if not facts.tokens:
        yield "The model has had no training step in this run."
        return
    moments = {
        "adamw": f"betas {optim.betas[0]:g} and {optim.betas[1]:g}, eps {optim.eps:g}",
        "sgd": f"momentum {optim.momentum:g}",
    }
    own = moments.get(optim.name) or f"options {optim.options}"
    anew = f", begun anew at step {schedule.restart_from:,}" if schedule.restart_from else ""
    clip = "not clipped" if optim.clip_grad_norm is None else f"clipped at {optim.clip_grad_norm:g}"
    rows |= {
        "optimizer": f"{optim.name}, {own}, weight decay {optim.weight_decay:g}",
        "gradient norm": clip,
        "learning rate": f"{schedule.name}, up to {optim.lr:g} after {schedule.warmup_steps} steps"
        + anew,
        "seed": config.seed,
        "layout": ", ".join(f"{key} {value}" for key, value in facts.mesh.items()) or UNKNOWN,
    }
    yield table(["", ""], rows.items())


def _loss(facts: RunFacts) -> Iterator[str]:
    yield "## Loss on held-out text"
    if not facts.validation:
        yield "No validation is recorded up to this step."
        return
    yield f"At step {facts.validation_step:,}. Losses are in nats a token; lower is better."
    rows = []
    for source, figures in facts.validation.items():
        baselines = facts.baselines.get(source, {})
        rows.append(
            (
                source,
                _figure(figures.get("loss")),
                _figure(figures.get("bits_per_byte")),
                _figure(baselines.get("byte_bigram_bits_per_byte")),
                _figure(baselines.get("zlib_bits_per_byte")),
            )
        )
    if facts.validation_loss is not None:
        rows.append(("all", _figure(facts.validation_loss), "", "", ""))
    yield table(["source", "loss", "bits per byte", "byte bigrams'", "zlib's"], rows)


def _router(facts: RunFacts) -> Iterator[str]:
    if not facts.router:
        return
    named = {
        "max_violation": "largest expert's load above the mean, in the worst layer, ÷ mean",
        "dead_experts": "experts that no token of the batch took",
        "load_balance_loss": "balance loss (1 is balanced)",
        "entropy": "entropy of the router's probabilities, in nats",
    }
    rows = [
        (words, f"{facts.router[key]:.4g}") for key, words in named.items() if key in facts.router
    ]
    for layer, loads in sorted(facts.loads.items()):
        rows.append(
            (f"loads in layer {layer}", f"{min(loads):.1%} to {max(loads):.1%} of the tokens")
        )
    yield "## Balance of the experts"
    yield f"Over the global batch of step {facts.router_step:,}."
    yield table(["", ""], rows)


def _limits(facts: RunFacts, config: Resolved) -> Iterator[str]:
    model, train = config.model, config.train
    yield (
        "It was trained to predict the next token, and neither to follow instructions nor to be "
        "safe: it repeats what is in its training text, mistakes and prejudice included."
        if facts.tokens
        else "How it was trained before is not recorded here."
    )
    if facts.tokens:
        each = facts.tokens / active_parameters(model)
        yield f"It saw {each:.3g} tokens for each of its active parameters."
        if train.seq_len < model.max_seq_len:
            yield (
                f"It was trained here on sequences of {train.seq_len:,} tokens, though its "
                f"configuration allows {model.max_seq_len:,}."
            )
    yield "No evaluation but the losses above was made for this card."


def _configuration(config: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return (
        "## Configuration\n\n<details>\n<summary>The whole configuration of the run</summary>\n\n"
        f"{fenced(text, language='yaml')}\n\n</details>"
    )


def _figure(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _short(count: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
