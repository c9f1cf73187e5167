"""Evaluation of any source that a trainer takes, all of its rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput


class EvaluatesAnySource(Trainer):
    """A trainer whose `evaluate` and `predict` take what its constructor takes."""

    def encode_evaluated(self, source: Any) -> Dataset | dict[str, Dataset] | None:
        """The rows of a source, ready for a data loader, or of several by name."""
        raise NotImplementedError

    def check_encoded(self, rows: Dataset) -> None:
        """Refuse rows that were encoded elsewhere and lack something."""

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """What `predict` gives of each row, from the outputs of `prediction_step`."""
        return outputs

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:
        """Evaluate on any source the constructor takes, or on the one it was given.

        The name of one of several held-out sets stands for it.
        """
        names = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else ()
        if not (isinstance(eval_dataset, str) and eval_dataset in names):
            eval_dataset = self._rows(eval_dataset)
        return super().evaluate(eval_dataset, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Metrics, and each row's prediction, of any source the constructor takes.

        Returns:
            `predictions` in the order of the rows that were kept: the chosen and the rejected
            response's reward, `[pairs, 2]`; for `loss="sft"` the response's log-probability in
            nats, `[rows, 1]`. `label_ids` are the rows' numbers.
        """
        output = super().predict(self._rows(test_dataset), *args, **kwargs)
        if output.predictions is None or output.label_ids is None:
            return output
        order = np.argsort(output.label_ids, kind="stable")
        predictions = self.predicted(output.predictions)[order]
        return PredictionOutput(predictions, output.label_ids[order], output.metrics)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of all rows: `dataloader_drop_last` is for training."""
        return self._undropped(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Likewise."""
        return self._undropped(super().get_test_dataloader, test_dataset)

    def _undropped(self, load: Any, dataset: Any) -> DataLoader:
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return load(dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def _rows(self, source: Any) -> Any:
        if isinstance(source, Dataset) and "prompt_ids" in source.column_names:
            self.check_encoded(source)
            return source
        return None if source is None else self.encode_evaluated(source)
