"""What is to be made of a dense checkpoint: the options of an upcycling, checked where they need no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from moeconv.errors import RecipeError

Method = Literal["copy", "virtual-group", "drop", "noise", "split", "mix", "expand"]
Placement = Literal["down", "up_down", "all", "none"]
Router = Literal["random", "zeros-mean", "hidden", "centroid"]
Partition = Literal["random", "clusters"]

METHODS: tuple[Method, ...] = get_args(Method)
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
ROUTERS: tuple[Router, ...] = get_args(Router)
PARTITIONS: tuple[Partition, ...] = get_args(Partition)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts whose hidden states make a router row: what the expert is for, and what it is not for."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The options of an upcycling; None stands for what the method takes by default."""

    method: Method = "copy"
    "How experts are made of the feed-forward part."
    carrier: str | None = None
    "The architecture (model_type) that holds the result; by default one that holds the source exactly."
    experts: int | None = None
    "Routed experts of a layer in the result."
    top_k: int | None = None
    "Experts that a token is routed to."
    granularity: int = 1
    "Into how many experts each copy of the feed-forward part is cut."
    shared_experts: int = 0
    "Experts, each as wide as a routed one, that every token passes."
    layers: tuple[int, ...] | None = None
    "The layers that become mixtures; by default all."
    scale_placement: Placement = "down"
    "Which matrices take the factor that makes up for the routing weights."
    renormalize: bool = True
    "Whether the weights of a token's experts sum to 1."
    drop_ratio: float = 0.5
    "Share of each expert's neurons that drop draws anew."
    drop_per_matrix: bool = False
    "Whether each of the three matrices draws its own neurons, as the authors' released code does."
    noise_std: float | None = None
    "Standard deviation of the noise on experts (noise, mix, expand); by default 0.001 for noise, else none."
    partition: Partition = "random"
    "How split deals neurons out to experts."
    branches: tuple[str, ...] = ()
    "mix: further dense checkpoints."
    assignment: tuple[int, ...] = ()
    "mix: the checkpoint of each expert, the source being 0; by default expert e comes from checkpoint e modulo their number."
    average: bool = True
    "mix: whether the other weights are the mean over all checkpoints; else they are the source's."
    router: Router = "random"
    "How router rows are made."
    router_std: float | None = None
    "Standard deviation of drawn router rows; by default 0.02, and 0.001 for the noise that expand puts on copied rows."
    prompts: tuple[Prompts, ...] = ()
    "hidden: the texts of each expert, or of each copy where the router's rows are repeated."
    hidden_average: bool = False
    "hidden: whether a text counts by its mean over tokens; else by its last token."
    seed: int = 0
    "Seed of everything that is drawn."
    force: bool = False
    "Whether to go on with what can't train well."

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("scale_placement", PLACEMENTS),
            ("router", ROUTERS),
            ("partition", PARTITIONS),
        ):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{option(name)} {getattr(self, name)}: expected one of {', '.join(allowed)}")
        for name, least in (("experts", 1), ("top_k", 1), ("granularity", 1), ("shared_experts", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{option(name)} {value}: expected at least {least}")
        if not 0 <= self.drop_ratio <= 1:
            raise RecipeError(f"--drop-ratio {self.drop_ratio}: expected a share from 0 to 1")
        for name in ("noise_std", "router_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise RecipeError(f"{option(name)} {value}: expected a finite number of at least 0")
        self._check_method()

    def _check_method(self) -> None:
        method = self.method
        if self.granularity > 1 and method in ("copy", "mix", "expand", "split"):
            use = "--method virtual-group" if method == "copy" else "--granularity 1"
            raise RecipeError(f"--granularity {self.granularity}: {method} keeps experts whole; give {use}")
        if method == "virtual-group" and self.granularity == 1:
            raise RecipeError("--method virtual-group cuts each copy into --granularity G experts; give G of 2 or more")
        if bool(self.branches) != (method == "mix"):
            raise RecipeError(
                "--method mix takes its experts from several checkpoints; give the others with --branch"
                if method == "mix"
                else f"--branch belongs to --method mix, not to {method}"
            )
        if self.noise_std is not None and method not in ("noise", "mix", "expand"):
            raise RecipeError(f"--noise-std belongs to --method noise, mix or expand, not to {method}")
        if self.assignment and (
            len(self.assignment) != self.experts or not set(self.assignment) <= set(range(1 + len(self.branches)))
        ):
            raise RecipeError(
                f"assignment {list(self.assignment)}: expected for each expert a checkpoint from 0 to {len(self.branches)}"
            )
        if self.shared_experts and method in ("split", "mix", "expand"):
            raise RecipeError(f"--shared-experts {self.shared_experts}: {method} makes none; leave it out")
        if bool(self.prompts) != (self.router == "hidden"):
            raise RecipeError("--router hidden and --prompts go together: give both or neither")
        if self.router == "centroid" and method not in ("split", "mix", "drop"):
            raise RecipeError(f"--router centroid: the experts of {method} have equal centroids; give --router random")
        if method == "expand" and self.router != "random":
            raise RecipeError(f"--router {self.router}: expand copies the source's router; leave it out")


def option(name: str) -> str:
    """Give a field's name as the command line has it."""
    return "--" + name.replace("_", "-")


def from_table(table: Mapping[str, Any], where: str) -> Recipe:
    """Read a recipe from a table with the options' names, as a YAML file has it.

    Args:
        table: option name, with `-` or `_`, to value; `branches` and `prompts` are lists.
        where: the file's name, for messages.

    Returns:
        The recipe.

    Raises:
        RecipeError: an option is unknown or a value is wrong.
    """
    known = {f.name for f in fields(Recipe)}
    values = {str(key).replace("-", "_"): value for key, value in table.items()}
    for name in values:
        if name not in known:
            raise RecipeError(f"{where}: {name!r} is no option of an upcycling; known are {', '.join(sorted(known))}")
    if "prompts" in values:
        values["prompts"] = tuple(read_prompts(entry, where) for entry in values["prompts"])
    for name in ("branches", "layers", "assignment"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    try:
        return Recipe(**values)
    except TypeError as error:
        raise RecipeError(f"{where}: a value has the wrong type: {error}") from None


def read_prompts(entry: Any, where: str) -> Prompts:
    """Read the texts of one expert: a list of texts, or a table with `positive_prompts` and `negative_prompts`.

    Raises:
        RecipeError: there is no text, or something else.
    """
    table = {"positive_prompts": entry} if isinstance(entry, list) else entry
    if not isinstance(table, Mapping) or not table.get("positive_prompts"):
        raise RecipeError(f"{where}: expected for each expert a list of texts, or positive_prompts; got {entry!r}")
    positive, negative = (tuple(map(str, table.get(k) or ())) for k in ("positive_prompts", "negative_prompts"))
    return Prompts(positive, negative)
