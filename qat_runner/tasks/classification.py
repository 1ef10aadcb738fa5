"""Which of a number of classes a picture is of."""

from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.config import Config
from qat_runner.config.tasks import FACTS
from qat_runner.data import ImageData
from qat_runner.models import MODELS, build_model
from qat_runner.tasks.task import Choice
from qat_runner.tasks.totals import Totals, top_five


class Classification(Choice[ImageData]):
    """Pictures [N, 3, H, W] in, logits [N, classes] out; judged by top-1 accuracy."""

    name = "classification"
    facts = FACTS[name]
    networks = MODELS
    unit = "img"
    inputs = ("pictures",)
    outputs = ("logits",)

    def network(self, config: Config, data: ImageData | None, pretrained: bool = False) -> nn.Module:
        """With 2 classes where neither data nor config tell their number."""
        classes, size = config.dataset.num_classes or 2, config.dataset.image_size
        if data is not None:
            classes, size = data.num_classes, data.image_size
        return build_model(config.model.name, classes, size, config.model.stem, config.model.width)

    def knows_head(self, config: Config) -> bool:
        return config.dataset.num_classes is not None

    def right(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return predictions == targets

    def totals(self, device: torch.device) -> Totals:
        return Totals(device, ("top1", "top5"), top_five)

    def score(self, data: ImageData) -> Totals:
        return self.totals(data.device)

    def about(self, config: Config, data: ImageData) -> dict[str, Any]:
        return {
            "picture": {
                "shape": ["N", 3, data.image_size, data.image_size],
                "normalization": "(value in 0..1 - mean) / std, a number a channel",
                "mean": list(config.dataset.mean),
                "std": list(config.dataset.std),
            },
            "classes": data.num_classes,
        }
