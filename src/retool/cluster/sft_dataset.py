"""Our conversations as a data set of verl's ``sft_trainer`` (``data.custom_cls``). Its processes import this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.data import Dataset

from retool.errors import ConfigError


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Ids and masks as ``cluster.sft.prepare`` wrote them; nothing is tokenised again.

    verl's loss moves the mask one place to the left over the packed sequences, so that a masked token is predicted from
    the one before it; a sequence's first token, which has none, is never learnt.

    Args:
        parquet_files: one file or several, with the columns ``ids`` and ``mask``.
        config: verl's ``data`` section.
        max_samples: only the first so many; -1: all.

    Raises:
        ConfigError: the sequences are to be padded, which verl's engine does not take.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str],
        tokenizer: Any,
        config: Mapping[str, Any],
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        if (mode := config.get("pad_mode", "no_padding")) != "no_padding":
            raise ConfigError(f"--verl data.pad_mode={mode}: conversations are packed; leave it at no_padding")
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        table = pa.concat_tables([pq.read_table(file, columns=["ids", "mask"]) for file in files])
        self._table = table if max_samples < 0 else table.slice(0, max_samples)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids``, ``position_ids`` and ``loss_mask`` (1 on the tokens that are learnt), int64 ``[T]`` each."""
        ids_T, mask_T = (
            torch.tensor(self._table[name][index].values.to_numpy(), dtype=torch.long) for name in ("ids", "mask")
        )
        return {"input_ids": ids_T, "position_ids": torch.arange(len(ids_T)), "loss_mask": mask_T}
