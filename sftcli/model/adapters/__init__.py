"""What is trained beside a frozen model: applied to it from outside, stored in PEFT's files."""

from sftcli.model.adapters import lora, prefix
from sftcli.model.families import Family
from sftcli.model.gpt import GPT
from sftcli.recipe import Lora, Prefix


def adapt(model: GPT, family: Family, options: Lora | Prefix, seed: int) -> None:
    """Freeze the model and let only an adapter train."""
    if isinstance(options, Prefix):
        prefix.adapt(model, options, seed)
    else:
        lora.adapt(model, family, options, seed)
