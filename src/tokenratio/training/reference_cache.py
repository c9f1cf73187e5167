"""The outputs of a frozen reference on a data set, per token, computed once and kept on disk.

An entry is named by the SHA-256 of everything its values depend on: the reference's weights and
configuration, the rows as tokens, the precision it ran in. A changed input has another name, so a
stale entry is never found.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from tokenratio.data import PairCollator, PreparedData
from tokenratio.data.length_grouping import row_lengths
from tokenratio.errors import TokenRatioError
from tokenratio.models.heartbeat import advance
from tokenratio.models.packing import model_inputs
from tokenratio.models.processes import current
from tokenratio.models.reference import digest_of_weights, model_digest
from tokenratio.models.token_requests import TokenRequest, eval_mode, language_model
from tokenratio.run_folder import package_version
from tokenratio.training.cache_entry import (
    SIDES,
    FileLayout,
    ReferenceCache,
    What,
    begin_entry,
    find_flaw,
    finish_entry,
    open_to_write,
)
from tokenratio.training.memory import format_bytes
from tokenratio.types import PairBatch

# Raise this whenever the same inputs would give other values, or an entry changes its form.
_FORMAT = 1
# Entries of a configuration that do not affect the values.
_VOLATILE = {"_name_or_path", "name_or_path", "transformers_version", "use_cache"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSettings:
    """Where and how a reference is run on a data set.

    Attributes:
        root: the folder of all entries.
        batch_size: pairs run at once.
        device: where to run; the model is moved there only if it has to run.
        padding_id: fills shorter rows.
        autocast: the dtype of mixed precision, None without it; use the policy's.
        progress: draw a bar, in pairs, on the main process.
    """

    root: str | Path
    batch_size: int
    device: torch.device
    padding_id: int
    autocast: torch.dtype | None = None
    progress: bool = True


def reference_cache(
    reference_model: PreTrainedModel | PeftModel,
    data: PreparedData,
    what: What,
    settings: CacheSettings,
) -> ReferenceCache:
    """Open the entry of this reference and this data, or compute it.

    Every process must call it. Those of one machine share the computation; each machine writes an
    entry of its own, or one for all if they share `settings.root`.

    Args:
        reference_model: answers token requests, without the wrappers of training around it; under
            PEFT it runs with its adapters off.
        data: preference pairs.
        what: `log_probs`, or `hidden` for losses that need the reference's whole distribution,
            which its head computes from them.
    Raises:
        TokenRatioError: the entry does not fit on the disk or cannot be written, or the
            reference's outputs on a row are not finite.
    """
    state = PartialState()
    runner = _Runner(reference_model, data, what, settings)
    # The first process of each machine decides for the others there.
    mine = _plan(runner, Path(settings.root).expanduser()) if state.is_local_main_process else None
    plans = gather_object([mine])
    first = state.process_index - state.local_process_index
    after = [index for index, plan in enumerate(plans) if index > first and plan is not None]
    neighbours = min([*after, len(plans)]) - first
    plan = plans[first]
    try:
        for refusal in (plan.refusal for plan in plans if plan is not None):
            if refusal is not None:
                raise TokenRatioError(refusal)
        if plan.work is not None:
            share = range(state.local_process_index, runner.num_batches, neighbours)
            show = settings.progress and state.is_main_process
            runner.write(plan.work, plan.layout, share, show)
        # Twice on every process, even if its machine has the entry: all must reach both barriers.
        current().gather(None)  # in a shared command: as long as the others finish batches
        state.wait_for_everyone()
        if mine is not None and mine.work is not None:
            finish_entry(mine.work, mine.folder, mine.ingredients or {})
        state.wait_for_everyone()
    except OSError as error:
        raise TokenRatioError(f"cannot write the reference cache: {error}") from None
    finally:
        if mine is not None and mine.work is not None:
            shutil.rmtree(mine.work, ignore_errors=True)
    return ReferenceCache(plan.folder, what)


# --- running the reference ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runner:
    """The reference and what it is run on."""

    model: PreTrainedModel | PeftModel
    data: PreparedData
    what: What
    settings: CacheSettings

    @property
    def num_batches(self) -> int:
        return math.ceil(len(self.data.dataset) / self.settings.batch_size)

    def layout(self) -> FileLayout:
        """The shape of the entry; that of a hidden state is found by computing the last row."""
        if self.what == "log_probs":
            return FileLayout.of(self.data, self.what, (), torch.float32)
        with self._running():
            state = self._ask(self._order()[-1:])[0]
        return FileLayout.of(self.data, self.what, (len(state),), state.dtype)

    def write(self, work: Path, layout: FileLayout, share: range, progress: bool) -> None:
        """Run the batches of `share` and write the outputs into the unfinished entry."""
        order, size = self._order(), self.settings.batch_size
        batches = [order[i * size : (i + 1) * size] for i in share]
        with (
            self._running(),
            open_to_write(work) as file,
            tqdm(
                total=sum(map(len, batches)), desc="reference", unit="pair", disable=not progress
            ) as bar,
        ):
            for rows in batches:
                places = [(side, row) for side in SIDES for row in rows]
                values = self._ask(rows).cpu()
                parts = values.split([layout.tokens(*place) for place in places])
                for (side, row), part in zip(places, parts, strict=True):
                    if not part.isfinite().all():
                        raise TokenRatioError(
                            f"the reference's outputs on {self.data.dataset[int(row)]['origin']} "
                            f"({side}) are not finite: it cannot be trained against"
                        )
                    layout.write(file, side, row, part)
                advance()
                bar.update(len(rows))

    def _order(self) -> NDArray[np.intp]:
        """Rows by length, the longest first, so that a lack of memory shows at once."""
        lengths = row_lengths(self.data.dataset, pruned=self.what == "hidden")
        return np.argsort(-lengths, kind="stable")

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        settings = self.settings
        self.model.to(settings.device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
        adapted = self.model if isinstance(self.model, PeftModel) else None
        with (
            eval_mode(self.model),
            torch.no_grad(),
            torch.autocast(
                settings.device.type,
                dtype=settings.autocast,
                enabled=settings.autocast is not None,
            ),
            contextlib.nullcontext() if adapted is None else adapted.disable_adapter(),
        ):
            yield

    def _ask(self, rows: Sequence[int] | NDArray[np.intp]) -> Tensor:
        """One value per response token of `rows`: those of the chosen side, then the rejected."""
        examples = [self.data.dataset[int(row)] for row in rows]
        if self.what == "hidden":
            for example in examples:
                shared = min(len(example[f"{side}_ids"]) for side in SIDES)
                example |= {f"{side}_ids": example[f"{side}_ids"][:shared] for side in SIDES}
        fields = PairCollator(self.settings.padding_id)(examples)
        device = self.settings.device
        batch = PairBatch(**{name: field.to(device) for name, field in fields.items()})
        request = TokenRequest(batch.states, batch.labels if self.what == "log_probs" else None)
        inputs = model_inputs(batch, language_model(self.model))
        return self.model(**inputs, token_request=request)[self.what]


# --- what an entry is called ----------------------------------------------------------------------


def _ingredients(runner: _Runner) -> dict[str, Any]:
    """Everything that an entry's values depend on."""
    base = language_model(runner.model)
    config = base.config.get_text_config()
    return {
        "format": _FORMAT,
        "what": runner.what,
        "model": model_digest(runner.model),
        "buffers": _buffers_digest(base),
        "class": f"{type(base).__module__}.{type(base).__qualname__}",
        "config": _lasting(base.config.to_dict()),
        # `to_dict` leaves these two out.
        "attention": config._attn_implementation,
        "experts": getattr(config, "_experts_implementation", None),
        "rows": _rows_digest(runner.data),
        "device": runner.settings.device.type,
        "autocast": str(runner.settings.autocast),
        "float32_products": _float32_products(runner.settings.device),
        "versions": {name: package_version(name) for name in ("torch", "transformers")},
    }


def _rows_digest(data: PreparedData) -> str:
    """SHA-256 of the tokens of every row as the data set has them now, selected or reordered."""
    digest = hashlib.sha256()
    table = data.dataset.with_format("arrow")[:]
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        column = table[name].combine_chunks()
        for part in (pc.list_value_length(column), pc.list_flatten(column)):
            digest.update(part.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def _float32_products(device: torch.device) -> str:
    """What float32 matrix products are computed in: float32, or the shorter tf32."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "float32" if precision in ("none", "ieee", "highest") else precision


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _lasting(v) for k, v in value.items() if k not in _VOLATILE}
    return value


def _buffers_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the buffers that are saved with a model, such as a router's correction bias."""
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return digest_of_weights(item for item in model.state_dict().items() if item[0] not in weights)


# --- deciding what to do --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What to do: nothing if the entry exists, or refuse, or compute it."""

    folder: Path
    refusal: str | None = None
    layout: FileLayout | None = None
    work: Path | None = None
    ingredients: Mapping[str, Any] | None = None


def _plan(runner: _Runner, root: Path) -> _Plan:
    ingredients = _ingredients(runner)
    text = json.dumps(ingredients, sort_keys=True, default=str)
    folder = root / hashlib.sha256(text.encode()).hexdigest()
    try:
        if folder.exists():
            flaw = find_flaw(folder)
            if flaw is None:
                return _Plan(folder)
            _log.warning("recomputing the reference cache: %s is damaged (%s)", folder, flaw)
            shutil.rmtree(folder)
        layout = runner.layout()
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if layout.size > free:
            return _Plan(
                folder,
                f"the reference cache needs {format_bytes(layout.size)}, and {root} has "
                f"{format_bytes(free)} free: choose a folder on a larger disk, or turn it off",
            )
        _log.warning(
            "computing the reference's %s once: %s on disk in %s (%s free)",
            runner.what.replace("_", " "),
            format_bytes(layout.size),
            root,
            format_bytes(free),
        )
        return _Plan(folder, None, layout, begin_entry(folder, layout), ingredients)
    except OSError as error:
        return _Plan(folder, f"cannot write the reference cache: {error}")
