"""Speed and size of every kind of separator: real-time factor, multiply-adds and parameters, on the same audio.

    python -m benchmarks.speed.separators [--esc10 DIR] [--repeats 5]

All in one run, on one thread, and also on a GPU if there is one. The weights are random: they decide neither time nor
size. Ten seconds of sound, one query, and eight at once on a GPU. The query is a vector: text encoders run once a
label. The real-time factor is audio over wall time; its ratio is that to the smallest network within the same repeat.
Multiply-adds are those that torch counts (matrix products and convolutions, no Fourier transforms). Figures of the
original networks are from their own code with weights of the same shapes, on another machine. Writes ``separators.md``
and a table of docs/results.md.
"""

from __future__ import annotations

import copy
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pages
from engine.audio.decode import decode
from engine.scoring.metrics import snr_db
from engine.separators import NetworkConfig, QuerySeparator
from engine.separators.audiosep.network import AudioSepConfig
from engine.separators.audiosep.separator import AudioSep
from engine.separators.base import NetworkSeparator
from engine.separators.clapsep.network import ClapSepConfig
from engine.separators.clapsep.separator import ClapSep
from engine.separators.queries import Embeddings, Encoder, QueryEmbedder
from tune.demo.sounds import sound

_PAGE = Path(__file__).with_name("separators.md")
_DURATION_S, _BATCHES = 10.0, (1, 8)
_LABELS = ("rain", "siren")
SEPARATORS: dict[str, Callable[[], NetworkSeparator]] = {
    "built-in, laptop": lambda: QuerySeparator(NetworkConfig(), _LABELS),
    "built-in, large": lambda: QuerySeparator(NetworkConfig(channels=768, num_blocks=20), _LABELS),
    "CLAPSep": lambda: ClapSep(ClapSepConfig(), ()),
    "AudioSep": lambda: AudioSep(AudioSepConfig(), ()),
}
ORIGINALS = {
    "CLAPSep": ("3.96", "116.7", "0.16", "2.5"),
    "AudioSep": ("24.6", "26.4", "1.22", "2.96"),
}
"""Of the originals: G multiply-adds a second of sound, M parameters, seconds of one core a second of sound, GB."""
_EMBEDDING = {"CLAPSep": 512, "AudioSep": 512}


def mixture(esc10: Path | None, rate_hz: int) -> np.ndarray:
    """Ten seconds of a sum of two sounds."""
    if esc10 is None:
        sounds = [
            np.resize(
                sound(label, rng=np.random.default_rng([0, i]), duration_s=_DURATION_S), int(_DURATION_S * rate_hz)
            )
            for i, label in enumerate(_LABELS)
        ]
    else:
        paths = sorted((esc10 / "audio").iterdir())
        sounds = [
            np.resize(decode(path, sample_rate_hz=rate_hz), int(_DURATION_S * rate_hz))
            for path in (paths[0], paths[-1])
        ]
    samples_T: np.ndarray = (0.1 * sum(one / max(1e-9, float(np.abs(one).max())) for one in sounds)).astype(np.float32)
    return samples_T


class Measured:
    """A separator on a device with its input."""

    def __init__(self, name: str, esc10: Path | None, device: str, *, autocast: bool = False) -> None:
        torch.manual_seed(0)
        self.name, self.separator = name, SEPARATORS[name]().to(device).eval()
        self.device, self.autocast = device, autocast
        self.mix_T = torch.from_numpy(mixture(esc10, self.separator.sample_rate_hz))
        if self.name in _EMBEDDING:
            give_vectors(self.separator, _LABELS, _EMBEDDING[self.name])

    def run(self, batch: int) -> Tensor:
        """Stems of ``batch`` equal mixtures, from and to the memory of the CPU."""
        mix_BT = self.mix_T.expand(batch, -1).contiguous()
        with torch.autocast(self.device, enabled=self.autocast):
            return self.separator.separate(mix_BT, ["rain"] * batch).cpu()

    def multiply_adds(self) -> float:
        """Of a second of sound, in G."""
        torch.backends.mha.set_fastpath_enabled(False)  # fused layers are not counted
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product_flops}) as counter:
            self.run(1)
        torch.backends.mha.set_fastpath_enabled(True)
        return float(counter.get_total_flops()) / 2 / _DURATION_S / 1e9

    def parameters(self) -> float:
        """In M."""
        return sum(value.numel() for value in self.separator.parameters()) / 1e6

    def seconds(self, batch: int) -> float:
        """Wall time of one call."""
        started = time.perf_counter()
        self.run(batch)
        return time.perf_counter() - started


def _product_flops(_: Sequence[int], left: Sequence[int], right: Sequence[int], **_options: object) -> int:
    return 2 * math.prod(left) * right[-1]


def measure(esc10: Path | None, device: str, repeats: int, *, autocast: bool = False) -> list[list[str]]:
    """The rows of one device."""
    separators = [Measured(name, esc10, device, autocast=autocast) for name in SEPARATORS]
    rows = []
    for batch in _BATCHES if device == "cuda" else _BATCHES[:1]:
        for one in separators:
            one.run(batch)  # not timed: allocations, choice of algorithms
        times = [[one.seconds(batch) for one in separators] for _ in range(repeats)]
        for number, one in enumerate(separators):
            column = [row[number] for row in times]
            ratios = [row[number] / row[0] for row in times]
            found_db = math.nan
            if device != "cpu":
                found_db = difference_db(one.separator, one.mix_T[None], ["rain"], autocast=autocast)
            row = [
                one.name,
                f"{device}, 16 bits" if autocast else device,
                str(batch),
                f"{one.multiply_adds():.2f}",
                f"{one.parameters():.1f}",
                f"{batch * _DURATION_S / statistics.median(column):.1f}",
                f"{statistics.median(ratios):.1f}",
                f"{min(ratios):.1f} to {max(ratios):.1f}",
                "" if device == "cpu" else f"{-found_db:.0f}",
            ]
            rows.append(row)
            print(*row, flush=True)
    return rows


def give_vectors(separator: NetworkSeparator, labels: Sequence[str], num_features: int) -> None:
    """Let labels be vectors that are drawn at random, in place of those of a text encoder."""
    drawn_LE = torch.randn(len(labels), num_features, generator=torch.Generator().manual_seed(0))
    vectors = Embeddings(labels=tuple(labels), vectors_LE=nn.functional.normalize(drawn_LE), encoder="drawn")
    separator.embedder = QueryEmbedder(template="{}", encoder="drawn", open_encoder=_no_encoder, embeddings=vectors)


def _no_encoder() -> Encoder:
    raise ValueError("a query must be one of the labels with a vector, got another; there is no encoder here")


def difference_db(
    separator: NetworkSeparator,
    mix_MT: Tensor,
    queries: Sequence[str],
    *,
    autocast: bool = False,
    device: str = "cuda",
) -> float:
    """Level of what differs between stems of the CPU and of a device, relative to the stem; the highest of all.

    All queries are separated from every mixture, three times on the device, so that recorded kernels are among them.
    """
    rows = [row for row in range(len(mix_MT)) for _ in queries]
    named = [*queries] * len(mix_MT)
    here, there = copy.deepcopy(separator).cpu().eval(), copy.deepcopy(separator).to(device).eval()
    wanted_BT = here.separate(mix_MT, named, rows=rows)
    highest_db = -math.inf
    for _ in range(3):
        with torch.autocast(device, enabled=autocast):
            found_BT = there.separate(mix_MT, named, rows=rows).float().cpu()
        highest_db = max(highest_db, -float(snr_db(estimate=found_BT, reference=wanted_BT).min()))
    return highest_db


_COLUMNS = (
    "separator",
    "device",
    "clips at once",
    "G multiply-adds a second",
    "M parameters",
    "times real time",
    "time / laptop network",
    "range",
    "SNR to the CPU dB",
)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--esc10", type=Path, help="folder with audio/; without it, synthesised sounds")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each separator")
    parser.add_argument("--out", type=Path, help="write the table to this file only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for autocast in (False, True) if device == "cuda" else (False,):
            rows += measure(arguments.esc10, device, arguments.repeats, autocast=autocast)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    originals: Sequence[Sequence[str]] = [[name, *values] for name, values in ORIGINALS.items()]
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    parts = [
        pages.markdown(_COLUMNS, rows),
        "The original code, 10 s of sound on one core of another machine, its Fourier transforms as convolutions:",
        pages.markdown(
            ("original", "G multiply-adds a second", "M parameters", "s of a core a second", "GB resident"), originals
        ),
        f"{_DURATION_S:g} s of {'ESC-10' if arguments.esc10 else 'synthesised'} sound, {arguments.repeats} repeats, "
        f"one thread; all separators in one process of {peak_gb:.1f} GB at the most; torch {version('torch')}; "
        f"commit {pages.commit()}, {pages.hardware(gpu)}",
    ]
    print(*parts, sep="\n\n")
    if arguments.out:
        arguments.out.write_text("\n\n".join(parts) + "\n")
        return
    pages.write_page(_PAGE, "Separators", *parts)
    pages.fill(pages.RESULTS, "separators", "\n\n".join(parts))


if __name__ == "__main__":
    main()
