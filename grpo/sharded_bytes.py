"""What FSDP2 holds of a policy on each rank, at the moments of a step when it holds most."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from grpo.policy import LAYERS_CHECKED
from grpo.rehearsal import RowBytes

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Moment:
    """What the fullest GPU holds at a moment, in bytes by kind."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def beside(self, kept: dict[str, int]) -> "Moment":
        """The same with what is there all the time."""
        return Moment(self.name, kept | self.parts)


class ShardedPolicy:
    """A policy under FSDP2: a group of parameters for each layer, and one for its ends (embeddings,
    last norm, head).

    Parameters are cut by rows. Rank 0 has the most: rows / ranks, rounded up; gathered, or before
    gradients are summed over the ranks, a parameter takes that times the ranks.

    form: the policy without memory; ranks: over which it is sharded; width: bytes of a number of
    the compute type. What is trained is kept in float32, what is frozen in the compute type.
    """

    def __init__(self, form: PreTrainedModel, ranks: int, width: int) -> None:
        layers = form.get_decoder().layers
        in_layers = {id(p) for p in layers.parameters()}
        self.ranks, self.width = ranks, width
        self.layers = len(layers)
        self.parameters = list(form.parameters())
        self.layer = list(layers[0].parameters())
        self.ends = [p for p in self.parameters if id(p) not in in_layers]
        self.head = form.get_output_embeddings().weight
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.frozen = [p for p in self.parameters if not p.requires_grad]
        self.trained_in_layer = [p for p in self.layer if p.requires_grad]
        self.trained_ends = [p for p in self.ends if p.requires_grad]

    def own(self, parameters: Iterable[Tensor], width: int) -> int:
        """Bytes of rank 0's shares, `width` bytes a number."""
        return sum(-(-len(p) // self.ranks) * (p.numel() // len(p)) for p in parameters) * width

    def whole(self, parameters: Iterable[Tensor], width: int) -> int:
        """Bytes of all shares."""
        return self.ranks * self.own(parameters, width)

    @property
    def gathered(self) -> int:
        """Bytes gathered while a layer runs: the ends, it, and of several ranks' weights also what
        it is gathered into, before it (forward) or for the next one (backward)."""
        layers_at_once = 1 if self.ranks == 1 else 2
        one = self.whole(self.layer, self.width)
        return self.whole(self.ends, self.width) + layers_at_once * one

    def reference_pass(self, row: RowBytes) -> Moment:
        """A row is scored, in its layers or at its log-probs, whichever takes more."""
        if row.scored > row.forward:
            scoring = {"activations": row.hidden, "logits": row.scored - row.hidden}
        else:
            scoring = {"activations": row.forward}
        return Moment("reference", {"gathered weights": self.gathered} | scoring)

    def update(self, row: RowBytes, rows: int) -> list[Moment]:
        """The last of so many rows goes forward and back; the gradients of those before it stay."""
        gradients = self.own(self.trained, FLOAT32)
        before = gradients if rows > 1 else 0
        layer, ends = self.trained_in_layer, self.trained_ends
        at_logprobs = Moment(
            "log-probs",
            {
                "gathered weights": self.gathered - self.whole(self.layer, self.width),
                "activations": row.kept,
                "logits": row.logprobs - row.kept,
                "gradients": before,
            },
        )
        # The head's gradient waits for that of the embeddings.
        unsummed = self.whole(layer, self.width) + bool(ends) * self.head.numel() * self.width
        last_layer = Moment(
            "layers",
            {
                "gathered weights": self.gathered,
                "activations": row.backward,
                "gradients": before,
                "unsummed gradients": unsummed,
            },
        )
        # Those of the layer before are on their way to the other ranks. Their sum is added to what
        # other rows gave; without those it becomes the gradient.
        unsummed += self.whole(layer, FLOAT32)
        unsummed += self.own(layer, FLOAT32) if before else 0
        first_layer = Moment(
            "layers",
            {
                "gathered weights": self.gathered,
                "activations": row.backward - row.kept * (self.layers - 1) // self.layers,
                "gradients": before or self.layers * self.own(layer, FLOAT32),
                "unsummed gradients": unsummed,
            },
        )
        summed = self.whole(ends, FLOAT32)
        sums = self.own(ends, FLOAT32) if before else 0
        # FSDP2 copies them into one float32 buffer; then, on a single rank, divides it by 1.
        unsummed = summed + max(
            self.whole(ends, self.width), sums + (summed if self.ranks == 1 else 0)
        )
        at_ends = Moment("embeddings", {"gradients": gradients, "unsummed gradients": unsummed})
        return [at_logprobs, max(last_layer, first_layer, key=lambda m: m.total), at_ends]

    def refill(self) -> Moment:
        """The largest parameter is gathered as it is kept; a single rank has it whole."""
        largest = max(
            self.whole([p], FLOAT32 if p.requires_grad else self.width) for p in self.parameters
        )
        return Moment("refill", {"gathered weights": largest if self.ranks > 1 else 0})

    def to_load(self, processes: int) -> int:
        """Bytes that so many processes of a machine need to load a model saved in 16 bits: each its
        rows of a tensor at a time, and before, one of them the first layers, to check them."""
        rows = max(self.own([p], 2) for p in self.parameters)
        checked = [*self.ends, *self.layer * LAYERS_CHECKED]
        return max(processes * rows, sum(p.numel() for p in checked) * FLOAT32)
