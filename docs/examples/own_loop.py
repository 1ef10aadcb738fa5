"""Train your own network in your own loop: 4 bits from the first step, static scalars for inference at the end."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from qat_runner import freeze, noise_report, quantize_model

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
train, test = (x[:1500], y[:1500]), (x[1500:], y[1500:])

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(512, 10)),
)
quantize_model(model, bits=4, clipping="octav", gradient="mph", example=x[:8])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(5):
    for rows in torch.randperm(len(train[0])).split(100):
        loss = nn.functional.cross_entropy(model(train[0][rows]), train[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

print(noise_report(model, [test[0]]))  # SQNR of every tensor, compared with max-scaling
freeze(model, "averaged", train[0].split(100)[:5])  # clipping scalars become constants
accuracy = (model.eval()(test[0]).argmax(1) == test[1]).double().mean()
print(f"{100 * accuracy:.1f} % of the test images are correct, with static scalars")
