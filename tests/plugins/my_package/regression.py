"""A task that qat_runner does not have, predicting a number from an image of it, and its data set."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.config import Config
from qat_runner.config.tasks import IMAGE_KEYS, TaskFacts
from qat_runner.data import DATASETS, Dataset, ImageData
from qat_runner.models import MODELS, build_model
from qat_runner.tasks import Task, Totals


class Regression(Task[ImageData]):
    """Predicts a number [N, 1] from images [N, 3, H, W]; the metric is the share of numbers right after rounding."""

    name = "regression"
    facts = TaskFacts("rounded", ("scratch", "retrain"), IMAGE_KEYS, 5, 64, first_last_bits=8)
    networks = MODELS
    unit = "num"
    inputs = ("images",)
    outputs = ("number",)

    def network(self, config: Config, data: ImageData | None, pretrained: bool = False) -> nn.Module:
        return build_model(config.model.name, 1, config.dataset.image_size, config.model.stem)

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.mse_loss(logits[:, 0].float(), targets.float())

    def distance(self, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return F.mse_loss(logits.float(), teacher.float())

    def predictions(self, logits: Tensor) -> Tensor:
        return logits[:, 0].round()

    def right(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return predictions == targets

    def totals(self, device: torch.device) -> Totals:
        return Totals(device, ("rounded",), lambda logits, targets: [(logits[:, 0].round() == targets).sum()])

    def score(self, data: ImageData) -> Totals:
        return self.totals(data.device)


NUMBERS = Dataset("regression", DATASETS["digits"].read)
TASK = Regression()
"""The object that the entry point refers to."""
