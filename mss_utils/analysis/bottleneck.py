"""Is the bottleneck used? SDR when the core of the bottleneck is changed at inference."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mss_utils.config import WAVEFORM_MODELS, Run
from mss_utils.data import Store
from mss_utils.evaluation.bsseval import utterance_sdr
from mss_utils.models import load_model
from mss_utils.separation import separate
from mss_utils.training import middle_excerpts

# Column `intervention`: what is changed. B0 is a control: it has no order to shuffle.
INTERVENTIONS = {
    "constant": "with a constant output",
    "shuffled": "with shuffled frames",
    "isolated": "with isolated frames",
}


class ChangedCore(nn.Module):
    """A core with a constant output, frames in random order, or every frame on its own."""

    def __init__(self, core: nn.Module, intervention: str, constant: torch.Tensor):
        super().__init__()
        self.core, self.intervention, self.constant = core, intervention, constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, frames, width)` to the same shape."""
        if self.intervention == "constant":
            return self.constant.expand_as(x)
        if self.intervention == "isolated":
            return self.core(x.flatten(0, 1)[:, None]).view_as(x)
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
        return self.core(x[:, order])[:, order.argsort()]


def measure_bottleneck(run: Run, store: Store, target: str) -> Iterator[dict]:
    """Yield rows of the table `bottleneck`: utterance SDR in dB of the middle of each test track.

    The constant is the mean output of the core over the middle of the validation tracks.
    """
    for model, seed in itertools.product(WAVEFORM_MODELS, range(run.settings.seeds)):
        network = load_model(run.model_folder(target, model, seed))
        bottleneck: Any = network.bottleneck
        core = bottleneck.core
        constant = mean_output(network, core, run, store, target)
        cores = {name: ChangedCore(core, name, constant) for name in INTERVENTIONS}
        excerpts = middle_excerpts(store, run.settings, target, "test")
        for track, (mixture, reference) in zip(store.split("test"), excerpts, strict=True):
            for intervention, changed in {"none": core, **cores}.items():
                bottleneck.core = changed
                estimate = separate(network, mixture, store.sample_rate)
                key = dict(target=target, track=track.name, model=model, seed=seed)
                sdr = utterance_sdr(reference.T, estimate.T)
                yield key | dict(intervention=intervention, sdr=sdr)


def mean_output(
    network: nn.Module, core: nn.Module, run: Run, store: Store, target: str
) -> torch.Tensor:
    """Return the mean output of the core, `(width,)`, over the middle of the validation tracks."""
    outputs = []
    hook = core.register_forward_hook(
        lambda module, inputs, output: outputs.append(output.mean(dim=(0, 1)))
    )
    for mixture, _ in middle_excerpts(store, run.settings, target):
        separate(network, mixture, store.sample_rate)
    hook.remove()
    return torch.stack(outputs).mean(dim=0)
