"""The options of everything, as small classes: one section a stage. Checked in a blink, without torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sftcli.fieldtypes import Columns, Controls, Count, Decay, Files, Numbers, Positive, Seed, Share, Size, Spans, kind


class Options(BaseModel):
    """A section: unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)


class Init(Options):
    """A tokenizer and an empty GPT, from data."""

    data: Files = []
    preset: Literal["llama", "gpt2", "bert"] = "llama"
    tokenizer: Literal["bpe", "whitespace"] = "bpe"
    vocab_size: Positive = 1024
    template: str = "chatml"
    template_text: str | None = None
    controls: Controls = []  # control tokens beside the template's; `glm`, `bert`: those of an objective
    columns: Columns = {}
    layers: Positive = 6
    heads: Positive = 6
    kv_heads: Positive | None = None  # None: as many as heads
    width: Positive = 192
    mlp_width: Positive | None = None  # None: 8/3 of the width (llama), 4 times the width (gpt2, bert)
    context: Positive = 512
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    tied: bool = True  # one matrix for embedding and head

    @model_validator(mode="after")
    def shape_fits(self) -> "Init":
        if self.width % self.heads or (self.width // self.heads) % 2:
            fits = [heads for heads in range(1, min(self.width, 1024)) if self.width % (2 * heads) == 0]
            near = min(fits, key=lambda heads: abs(heads - self.heads), default=None)
            told = f" (heads={near} fits it)" if near else ""
            raise ValueError(f"width {self.width} must be heads {self.heads} times an even number{told}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.preset != "llama" and self.kv_heads not in (None, self.heads):
            raise ValueError(f"{self.preset} has as many kv_heads as heads")
        if self.preset == "bert" and not self.tied:
            raise ValueError("bert's embedding is its head, too: tied cannot be false")
        return self


InContent = Literal["escape", "error", "allow"]  # control strings in a message: plain text, refused, control tokens


class Tokenize(Options):
    """Raw JSONL -> documents."""

    data: Files = []
    columns: Columns = {}
    template: str | None = None  # chatml, llama3, alpaca, plain, or a Jinja file; None: the model folder's own
    template_text: str | None = None
    tokenizer: str | None = None  # a tokenizer.json, or `whitespace`, instead of a model folder
    special_in_content: InContent = "escape"
    on_error: Literal["fail", "skip"] = "fail"
    rejects: str | None = None


class Causal(Options):
    """Next-token prediction under a loss mask."""

    kind: Literal["causal"] = "causal"


class BlankInfilling(Options):
    """GLM's: spans of the text become blanks, which are filled after it, token by token."""

    kind: Literal["glm"] = "glm"
    level: Literal["token", "sentence", "document", "sft"] = "token"  # sft: the answer is the blank
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15  # token, sentence: the share of the text that is blanked
    span_mean: Annotated[float, Field(gt=0, le=30)] = 3.0  # token: of the Poisson that lengths come from
    min_ratio: Share = 0.5  # document: the shortest blank, as a share of the text
    suffix: Share = 0.5  # document: how often the blank is the end of the text
    seed: Seed = 0
    spans: Spans = []  # these blanks instead of drawn ones ...
    lengths: Numbers = []  # ... or these lengths,
    places: Numbers = []  # at these places (how many free tokens lie before each)
    order: Numbers = []  # the blanks in the order in which they are filled
    mask: Count | None = None  # ids; None: the tokenizer's [MASK], [sMASK] or [gMASK], by level,
    sop: Count | None = None  # <|startofpiece|>
    eop: Count | None = None  # and <|endofpiece|>

    @model_validator(mode="after")
    def blanks_are_possible(self) -> "BlankInfilling":
        if self.spans and (self.lengths or self.places):
            raise ValueError("spans, or lengths and places: give one of them")
        if self.places and len(self.places) != len(self.lengths):
            raise ValueError("places need as many lengths: lengths=3,1 places=0,0")
        if self.level == "sft" and (self.spans or self.lengths or self.order):
            raise ValueError("the blank of level sft is the answer: no spans, lengths, places or order")
        ends = [0, *(end for _, end in self.spans)]
        if any(not last <= a < b for last, (a, b) in zip(ends, self.spans, strict=False)) or 0 in self.lengths:
            raise ValueError("spans are start:end, from left to right, none of them empty")
        count = len(self.spans) or len(self.lengths)
        if self.order and count and sorted(self.order) != list(range(count)):
            raise ValueError(f"order must name the blanks 0..{count - 1}, each once")
        return self


class MaskedLM(Options):
    """BERT's: tokens are hidden and told from all others; and whether the second half of a row follows its first."""

    kind: Literal["bert"] = "bert"
    nsp: bool = True  # pairs of sentences; False: pieces of the text, no second loss
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15  # the share of a row that is chosen ...
    max_predictions: Positive = 20  # ... and the most tokens of it
    short: Share = 0.1  # how often a pair is made shorter than it may be
    copies: Positive = 1  # of each document, drawn anew
    seed: Seed = 0
    mask_positions: Numbers = []  # of each row, instead of drawn ones; all of them become [MASK]
    mask: Count | None = None  # ids; None: the tokenizer's [MASK],
    cls: Count | None = None  # [CLS]
    sep: Count | None = None  # and [SEP]


def _objective(value: Any) -> Any:
    """Options without a kind are those of the causal objective."""
    value = kind(value)
    return {"kind": "causal"} | value if isinstance(value, dict) else value


Objective = Annotated[Causal | BlankInfilling | MaskedLM, Field(discriminator="kind"), BeforeValidator(_objective)]


class Mask(Options):
    """Documents -> rows: which tokens are trained."""

    objective: Objective = Causal()
    train_on: str = "own"  # own | own-final | own-reasoning | last | all | after:IDS | between:IDS:IDS
    roles: Annotated[list[str], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)] = []
    no_match: Literal["drop", "error", "train"] = "drop"
    eod_mask_loss: int | None = None
    format: Literal["rows", "hf", "neox"] = "rows"
    seq_len: Positive | None = None
    max_length: Positive | None = None
    too_long: Literal["drop", "error", "truncate-prompt", "truncate"] = "drop"
    rejects: str | None = None
    drop_duplicates: bool = False  # rows whose ids, labels and weights have come before


class AdamW(Options):
    """AdamW, fused; decay on matrices only."""

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None  # None: 1e-3 from nothing, 2e-5 pretrained, 2e-4 an adapter
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


class Muon(Options):
    """Muon (torch's) on the matrices of the blocks; AdamW at the same lr on embeddings, head, norms and biases."""

    kind: Literal["muon"] = "muon"
    lr: Annotated[float, Field(gt=0)] | None = None
    momentum: Share = 0.95
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


def _optimizer(value: Any) -> Any:
    """`optimizer: {lr: 1e-3}` means AdamW."""
    value = kind(value)
    return {"kind": "adamw"} | value if isinstance(value, dict) else value


def _adapter(value: Any) -> Any:
    """`adapter: {rank: 8}` means LoRA."""
    value = kind(value)
    return {"kind": "lora"} | value if isinstance(value, dict) else value


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind"), BeforeValidator(_optimizer)]


class Schedule(Options):
    """The shape of the learning rate over the run. `warmup` and `decay` are shares of the run, clamped to fit it."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: Share = 0.03
    floor: Share = 0.0  # lr at the end, as a share of the peak
    decay: Share = 0.2  # wsd only: the last share of the run falls linearly


class Lora(Options):
    """A low-rank update beside frozen linear layers; names are those of the model's Hugging Face modules."""

    kind: Literal["lora"] = "lora"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32  # the update counts alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # on the update's input
    targets: list[str] | str = "all-linear"  # of the blocks; or ends of names [q_proj, v_proj], or a regex of paths
    layers: list[int] | None = None  # None: all
    rslora: bool = False  # alpha / sqrt(rank)
    dora: bool = False  # a trained length of every output row
    lora_plus: Annotated[float, Field(gt=0)] | None = None  # lr of B as a multiple of lr
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Files = []  # trained as a whole, such as embed_tokens, lm_head
    rank_pattern: dict[str, Positive] = {}  # end of a path (a regex) -> its own rank, alpha
    alpha_pattern: dict[str, float] = {}

    @model_validator(mode="after")
    def names_are_patterns(self) -> "Lora":
        regex = isinstance(self.targets, str) and self.targets != "all-linear"
        if regex and self.layers is not None:
            raise ValueError("layers need targets that are names, not a regular expression")
        for text in [*([str(self.targets)] if regex else []), *self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"{text!r} is not a regular expression: {error}") from None
        return self


class Loss(Options):
    """What a step minimises; eval losses are the plain nll whatever stands here."""

    reduction: Literal["token", "example", "turn"] = "token"  # what counts the same: each token, row or turn
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the label that is spread over all tokens
    z_loss: Annotated[float, Field(ge=0)] = 0.0  # times logsumexp^2; 1e-4 is usual
    dft: bool = False  # a token's weight times its probability
    neftune: Annotated[float, Field(ge=0)] = 0.0  # alpha of the noise on embeddings; 5 is usual


class Prefix(Options):
    """Trained keys and values before every row, in every layer; they take `length` positions of the context."""

    kind: Literal["prefix"] = "prefix"
    length: Positive = 10
    mlp: Positive | None = None  # trained through an MLP of this width, of which only the result is kept
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # on keys and values


class Prompt(Options):
    """Trained embeddings of virtual tokens before every row; they take `length` positions of the context."""

    kind: Literal["prompt"] = "prompt"
    length: Positive = 10
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


Adapter = Annotated[Lora | Prefix | Prompt, Field(discriminator="kind")]


class Train(Options):
    """Rows -> a model folder."""

    adapter: Annotated[Adapter | None, BeforeValidator(_adapter)] = None  # None: all weights are trained
    # what frozen matrices under an adapter are kept in; auto: the 16 bits that they are stored in, else float32
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    optimizer: Optimizer = AdamW()
    schedule: Annotated[Schedule, BeforeValidator(kind)] = Schedule()
    loss: Loss = Loss()
    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: Positive | None = None
    batch_tokens: Positive = 8192  # tokens of one optimizer step ...
    batch_rows: Positive | None = None  # ... or its rows
    # bounds one forward, never changes a step; None: 8192 on a GPU; 2048 on a CPU, 1024 with an adapter
    micro_batch_tokens: Positive | None = None
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: off
    nonfinite_skips: Count = 0  # steps of a run that may be left out because their loss or gradient is not finite
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool = False  # activations are computed again in backward instead of kept
    optimizer_offload: bool = False  # of a GPU: state of the optimizer lies in main memory, but for a step
    mix: dict[str, Annotated[float, Field(gt=0)]] = {}  # source -> times an epoch has its rows (0.3: a share of them)
    seed: Seed = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    deterministic: bool = False  # on a GPU: kernels that give the same bits every time, slower; a CPU's do anyway
    nproc: Positive = 1  # processes on this machine; under torchrun its own number
    parallel: Literal["ddp", "fsdp"] = "ddp"  # what each process holds: the whole model, or a share of it
    process_timeout: Positive = 120  # seconds that processes wait for one of them before they give up
    eval_data: str | None = None
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    eval_every: Positive | None = None  # steps; None: ten times a run
    patience: Positive | None = None  # stop after so many evaluations without a better loss; keeps the best
    sample_every: Positive | None = None  # steps; None: with every evaluation
    sample_rows: Annotated[int, Field(ge=0)] = 4
    sample_tokens: Positive = 64
    checkpoint_every: Positive | None = None  # steps; None: at the end of every epoch
    keep: Positive = 2
    allow_data_change: bool = False  # resumed with other rows: from there on they are trained
    save_dtype: Literal["float32", "bfloat16", "float16", "base"] = "float32"  # of the model; base: as it was stored
    shard_size: Size = "5GB"

    @model_validator(mode="after")
    def choices_fit(self) -> "Train":
        if self.base_dtype not in ("auto", "float32") and not self.adapter:
            raise ValueError(f"base_dtype {self.base_dtype} is for weights that an adapter leaves frozen")
        if self.parallel == "fsdp" and isinstance(self.adapter, Prompt):
            raise ValueError("parallel fsdp cannot train an adapter of kind prompt; ddp can")  # blocks run twice
        if self.parallel == "fsdp" and self.optimizer_offload:
            raise ValueError("parallel fsdp shares the optimizer's state out: optimizer_offload is for ddp")
        return self


class Generate(Options):
    """Prompts -> completions."""

    prompts: str | None = None
    adapter: Files = []  # runs or PEFT folders, each asked in turn; `none` is the base alone
    columns: Columns = {}
    template: str | None = None
    template_text: str | None = None
    special_in_content: InContent = "escape"
    fill: bool | None = None  # a prompt's blanks instead of going on at its end; None: if the model learned to
    batch_size: Positive = 32
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0: greedy
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    stop: Files = []
    n: Positive = 1
    seed: Seed = 0
    pad_side: Literal["left", "right"] = "left"
    deterministic: bool = False
    quantize: Literal["int8"] | None = None  # the weights, for decoding only
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


Metric = Literal["exact_match", "regex_match", "token_f1"]


class Evaluate(Options):
    """Scores of completions against their references."""

    metrics: list[Metric] = ["exact_match", "token_f1"]
    regex: str | None = None  # regex_match compares its first group (or the whole match) in both texts

    @model_validator(mode="after")
    def regex_is_there(self) -> "Evaluate":
        if "regex_match" in self.metrics and not self.regex:
            raise ValueError("the metric regex_match needs a regex, such as '#### (.+)'")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex {self.regex!r}: {error}") from None
        return self


class Recipe(Options):
    """A picture of a run: one section a stage."""

    model: str | None = None
    init: Init | None = None
    tokenize: Tokenize = Tokenize()
    mask: Mask = Mask()
    train: Train = Train()
    generate: Generate | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def model_is_given_once(self) -> "Recipe":
        if self.model and self.init:
            raise ValueError("both `model` and `init` are given; a recipe starts from one of them")
        if self.evaluate and not self.generate:
            raise ValueError("`evaluate` needs a `generate` section: it scores its completions")
        return self


SECTIONS: dict[str, type[Options]] = {
    "init": Init,
    "tokenize": Tokenize,
    "mask": Mask,
    "train": Train,
    "generate": Generate,
    "evaluate": Evaluate,
}
