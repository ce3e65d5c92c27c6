"""Names of cards to their peaks."""

import pytest

from vtprune_train.training.loop.metrics import PEAK_FLOPS, peak_of

NAMES = {
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A10G": "A10G",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}


@pytest.mark.parametrize(("name", "card"), NAMES.items())
def test_a_card_has_its_own_peak(name, card):
    assert peak_of(name) == PEAK_FLOPS[card]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A10", "NVIDIA L20", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
     "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L4 NVL"],
)  # fmt: skip
def test_a_card_that_is_not_listed_has_none(name):
    assert peak_of(name) is None
