"""Which parameters are trained how: one row for each role that the model has."""

from dataclasses import dataclass

import torch
from torch import nn

from moetrain.model import Transformer
from moetrain.model.roles import Role, role_of
from moetrain.optim import group_settings, moved_by
from moetrain.parallel import plain_name
from moetrain.settings import ModelSettings, OptimSettings


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """The parameters of one role, and how they are trained."""

    role: str
    tensors: int
    parameters: int
    optimizer: str | None
    """None where they are frozen."""
    lr_factor: float
    weight_decay: float
    """Of the matrices among them."""

    def __str__(self) -> str:
        trained = (
            "frozen"
            if self.optimizer is None
            else f"{self.optimizer}, learning rate x {self.lr_factor:g}, "
            f"weight decay {self.weight_decay:g}"
        )
        return f"{self.role}: {self.parameters:,} parameters, {trained}"


def parameter_groups(model: ModelSettings, optim: OptimSettings) -> list[ParameterGroup]:
    """Returns the groups of a model, in the order of its modules."""
    with torch.device("meta"):
        found = parameter_roles(Transformer(model))
    rows = []
    for role in dict.fromkeys(found.values()):
        own = group_settings(optim, role)
        members = [parameter for parameter, of in found.items() if of is role]
        decays = any(parameter.ndim > 1 for parameter in members)
        rows.append(
            ParameterGroup(
                role=role,
                tensors=len(members),
                parameters=sum(parameter.numel() for parameter in members),
                optimizer=moved_by(optim, role),
                lr_factor=own.lr_factor,
                weight_decay=optim.weight_decay * own.weight_decay_factor if decays else 0.0,
            )
        )
    return rows


def parameter_roles(model: Transformer) -> dict[nn.Parameter, Role]:
    """Returns the role of each parameter of a model, sharded or not, in the model's order."""
    return {p: role_of(plain_name(name)) for name, p in model.named_parameters()}


def freeze(model: Transformer, optim: OptimSettings) -> None:
    """Makes the parameters of frozen groups need no gradient."""
    for parameter, role in parameter_roles(model).items():
        if group_settings(optim, role).frozen:
            parameter.requires_grad_(False)
