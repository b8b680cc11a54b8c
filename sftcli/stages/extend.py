"""sft init --base: a model whose tokenizer lacks a template's control tokens -> one that has them."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sftcli import artifacts, console
from sftcli.model.checkpoint import load_trained, open_folder, save_model
from sftcli.model.gpt import GPT
from sftcli.reading import read_json
from sftcli.recipe import Init
from sftcli.stages.common import missing_controls
from sftcli.text.folder import folder_template, load_codec, stop_ids
from sftcli.text.template import Template, control_tokens, load_template
from sftcli.text.tokenizer import Codec
from sftcli.text.vocabulary import with_tags
from sftcli.writing import json_line, output_folder


def extend(base: str, options: Init, output: str) -> None:
    """Write a model folder with the template, its control tokens, and a row of the embedding for each of them."""
    folder = open_folder(artifacts.model_folder(base))
    codec = load_codec(folder.path)
    template = _template(folder.path, options, codec)
    new = missing_controls(template, codec)
    new += [token for token in dict.fromkeys(options.controls) if token not in codec.added and token not in new]
    with output_folder(output) as target:
        definition = _with_tokens(codec, new, control_tokens(template).get("tags", []))
        wider = Codec(definition, "the new tokenizer", codec.specials)
        network = load_trained(folder)
        _fill_rows(network, [wider.added[token] for token in new], codec.size)
        folder.json["vocab_size"] = network.config.vocab_size
        end = None if template.source == folder_template(folder.path) else control_tokens(template).get("eos")
        stops = [wider.added[end]] if end in wider.added else []
        stops += [stop for stop in stop_ids(folder.path) if stop not in stops]
        extra = {"tokenizer.json": definition}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if end and (folder.path / name).is_file():
                extra[name] = json_line(read_json(folder.path / name) | {"eos_token": end})
        save_model(network, folder, target, stops, template.source, None, extra=extra)
    told = "all its control tokens were there"
    if new:
        names, size = ", ".join(new), network.config.vocab_size
        told = f"{len(new)} new control tokens {names}; vocabulary of {size:,}, new rows the mean of the others; an "
        told += "adapter trains them under --set adapter.modules_to_save=[embed_tokens,lm_head]"
    console.note(f"init: {output}: {base} with template {template.name}; {told}")


def _template(path: Path, options: Init, codec: Codec) -> Template:
    """The one that flags name; where only control tokens are asked for, the base's own."""
    named = options.template_text is not None or "template" in options.model_fields_set
    if options.controls and not named and (own := folder_template(path)) is not None:
        return Template(own, f"of {path}", codec.specials)
    return load_template(options.template, options.template_text, options.columns, codec.specials)


def _with_tokens(codec: Codec, new: list[str], tags: list[str]) -> bytes:
    """tokenizer.json with further control tokens, whose ids come after all others."""
    tokenizer = Tokenizer.from_buffer(codec.definition)
    tokenizer.add_special_tokens(new)
    return with_tags(tokenizer, [tag for tag in tags if tag in new])


@torch.no_grad()
def _fill_rows(model: GPT, ids: list[int], known: int) -> None:
    """Give new ids the mean of the rows of known tokens; the matrices grow where there is no row to spare."""
    if not ids:
        return
    size = max(model.config.vocab_size, max(ids) + 1)
    tied = model.head.weight is model.embedding.weight

    def grown(rows: Tensor) -> nn.Parameter:
        mean = rows[:known].mean(0, keepdim=True)
        wider = torch.cat([rows, mean.expand(size - len(rows), *rows.shape[1:])])
        wider[ids] = mean
        return nn.Parameter(wider)

    model.embedding.weight = grown(model.embedding.weight)
    model.head.weight = model.embedding.weight if tied else grown(model.head.weight)
    if model.head.bias is not None:
        model.head.bias = grown(model.head.bias)
    model.config = replace(model.config, vocab_size=size)
