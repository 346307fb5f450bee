"""The cross-correlation of two views, before and after pre-training."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from mmfast.data import MultimodalDataset, collate
from mmfast.plots import correlation_matrix
from mmfast.training.checkpoint import RECORD, read_checkpoint
from mmfast.training.components import make_module
from mmfast.training.handover import load_part
from mmfast.training.module import StageModule
from mmfast.training.parsing import config_of
from mmfast.training.seeds import derive
from mmfast.training.stages import PRETRAINING, pretraining_stage


def before_and_after(checkpoint: Path, inputs: MultimodalDataset) -> tuple[Tensor, Tensor]:
    """Cross-correlation (D, D) with initial weights and with those of a pre-training checkpoint, on the same views.

    One batch of the size of pre-training's is taken from ``inputs``.
    """
    saved = read_checkpoint(checkpoint, PRETRAINING)
    config = config_of(saved[RECORD]["config"])
    module = make_module(config, saved[RECORD]["features"], pretraining_stage(config))
    batch = collate([inputs[i] for i in range(min(len(inputs), config.pretraining.batch_size))])
    before = cross_correlation(module, batch)
    for part in ("encoder", "projector"):
        load_part(getattr(module, part), saved["state_dict"], part, str(checkpoint))
    return before, cross_correlation(module, batch)


@torch.no_grad()
def cross_correlation(module: StageModule, batch) -> Tensor:
    """C (D, D) of the embeddings of two views of a batch, columns centred.

    Augmented by fixed draws, dropout off; the projector normalises by the batch as it does in training.
    """
    module.encoder.eval()
    augment = module.objectives["two_views"].augment.train()
    # A copy, for its running statistics must not move.
    projector = copy.deepcopy(module.projector).train()
    seed = derive(module.seed, "views of the report")
    views = augment(batch.values, batch.lengths, ids=batch.ids, seed=seed, padding=batch.padding)
    return correlation_matrix(
        *(projector(module.encoder(view, batch.lengths, batch.padding)) for view in views)
    )
