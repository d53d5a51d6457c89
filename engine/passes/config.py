"""Settings of a pass, and the identity by which an output folder recognizes its pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from engine.audio.decode import MAX_DURATION_S
from engine.corpus.table import Corpus
from engine.schema import SCORES_VERSION
from engine.settings import NEWER, RUNTIME, Count, Fraction, NonNegative, Positive, config, deciding

if TYPE_CHECKING:
    from engine.separators import SeparatorSource
    from engine.taggers import TaggerSource


@config
class PassConfig:
    """Settings for cutting a corpus into clips, grouping them into shards and placing the work on the cluster."""

    clip_s: Annotated[Positive, Field(le=MAX_DURATION_S)] = 10.0
    """Longer recordings are cut into clips of this length, in seconds. Clips are held in memory."""
    min_clip_s: NonNegative = 1.0
    """A shorter segment or complete file, in seconds, is a failure; a shorter remainder of a cut recording is dropped.

    At most ``clip_s``.
    """
    min_labels: Count = 2
    """Clips with fewer labels are set aside and counted: there is nothing to separate their sound from."""
    reseparate: bool = False
    """Also compute the scores of re-separation, which take two more forward passes for each stem."""
    rows_per_task: Count = 64
    """Rows of the manifest that one decoding task owns."""
    shard_s: Positive = 320.0
    """Audio of a stem shard, in seconds of mixture. A shard is written, or redone, as a whole."""
    stem_rate_hz: Annotated[Count | None, NEWER] = None
    """Rate of the mixtures and stems that are written, in Hz; null: the separator's, at which they are scored.

    A run sets it to the rate of its students.
    """
    batch_s: Annotated[Positive | None, RUNTIME] = None
    """Audio in one call of the separator, in seconds, padding included; lowered automatically if memory runs out.

    Null: 80 on a CPU; a GPU actor begins there and doubles it while that makes its card faster.
    """
    min_actors: Annotated[Count | None, RUNTIME] = None
    """Separator actors to start with; null: as many as there is room for."""
    max_actors: Annotated[Count | None, RUNTIME] = None
    """Upper limit of separator actors, which Ray adds while work is waiting; null: as many as fit when the pass starts.

    If nodes join later, set it, and ``num_gpus_per_actor`` too if they have GPUs: the pass then waits for them.
    """
    num_gpus_per_actor: Annotated[NonNegative | None, RUNTIME] = None
    """GPUs of a separator actor, fractions allowed; null: 1 if the cluster has GPUs when the pass starts, else 0."""
    num_cpus_per_actor: Annotated[Positive, RUNTIME] = 0.5
    """CPUs of a separator actor; a value below 1 leaves CPUs for reading and writing on small machines."""
    autocast: Annotated[bool, RUNTIME] = True
    """Separate in 16 bits on a GPU."""
    decode_limit_s: Annotated[Positive, RUNTIME] = 60.0
    """Time limit for decoding ten minutes of audio, in seconds; a file that takes longer is damaged or malicious."""
    separate_limit_s: Annotated[Positive, Field(le=1e6), RUNTIME] = 1200.0
    """Time limit for 80 s of audio (or ``batch_s``) in the separator or tagger, in seconds; longer batches get more.

    A process that takes longer hangs and is replaced; a clip at which that happens again and again fails.
    """
    max_failed_fraction: Annotated[Fraction, RUNTIME] = 0.5
    """A pass stops early if a larger fraction of its queries fails; 1 allows all of them to fail."""

    def __post_init__(self) -> None:
        if self.min_clip_s > self.clip_s:
            raise ValueError(f"min_clip_s must be at most clip_s={self.clip_s:g}, got {self.min_clip_s:g}; set both")
        if self.max_actors is not None and self.max_actors < (self.min_actors or 1):
            raise ValueError(
                f"max_actors must be at least min_actors ({self.min_actors}), got {self.max_actors}; raise max_actors"
            )

    @property
    def clips_per_shard(self) -> int:
        """Clips of a shard, at the most."""
        return max(1, int(self.shard_s / self.clip_s))


def pass_identity(
    corpus: Corpus, *, separator: SeparatorSource, tagger: TaggerSource | None, config: PassConfig
) -> dict[str, object]:
    """Everything that decides the stems and scores of a pass, models and corpus by their fingerprints."""
    return {
        "score version": SCORES_VERSION,
        "settings": deciding(config),
        "separator": separator.fingerprint,
        "tagger": tagger.fingerprint if tagger is not None else None,
        "corpus": corpus.fingerprint,
    }
