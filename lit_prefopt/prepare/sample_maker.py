"""Form the samples that a conversion writes, and count those that it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lit_prefopt.data.loading.broken_samples import ALWAYS_ALLOWED
from lit_prefopt.errors import InputError
from lit_prefopt.prepare.counts import ConversionSummary, NamedCount
from lit_prefopt.prepare.form_pairs import Matches, Ties
from lit_prefopt.prepare.form_samples import (
    RecordSample,
    Samples,
    samples_from_record,
    shortened_list,
)
from lit_prefopt.prepare.image_checks import CheckedImage, digest
from lit_prefopt.prepare.prompt_length import exceeds_context
from lit_prefopt.prepare.records import Record

ODD_SHARE = 0.01  # share of labels outside 0 to 1 from which on the column has another scale


class LoadedRecord(NamedTuple):
    """A record with its images, or the reason why it could not be loaded."""

    record: Record | None
    files: list[CheckedImage | str]  # an image, or its error
    reason: str = ""  # why there is no record
    unlabelled: bool = False  # whether the record only lacks a preference
    odd_label: bool = False  # whether its label is a number, but no probability


class SampleMaker:
    """Forms samples from loaded records and counts those that it skips.

    Args:
        kind: What to form.
        matches: Which pairs of a list, for pairs.
        ties: Whether ties are written.
        list_size: Number of images of every list; as many as a list has if not given.
        broken_share: Maximum share of broken records and images.
    """

    def __init__(
        self,
        kind: Samples,
        matches: Matches,
        ties: Ties,
        list_size: int | None,
        broken_share: float,
    ) -> None:
        self.kind, self.matches, self.ties = kind, matches, ties
        self.list_size, self.broken_share = list_size, broken_share
        self.summary = ConversionSummary(kind=kind)
        self.odd_labels = NamedCount()
        self.unlabelled = ""  # the first record without a preference
        self.seen: set[bytes] = set()  # about 100 bytes per sample

    def samples(
        self, loaded: LoadedRecord
    ) -> Iterator[tuple[RecordSample, str, list[CheckedImage]]]:
        """Yield the samples to write, each with its text and its images."""
        self.summary.records += 1
        if loaded.odd_label:
            self.odd_labels.add(loaded.reason)
            if self.odd_labels.count > max(ALWAYS_ALLOWED, ODD_SHARE * self.summary.records):
                self.check_labels()
        if loaded.record is None:
            if not loaded.unlabelled:
                self._broken(loaded.reason)
            else:
                self.summary.unlabelled += 1
                self.unlabelled = self.unlabelled or loaded.reason
            return
        self.summary.images += len(loaded.files)
        for file in loaded.files:
            if isinstance(file, str):
                self._broken(file)
        record = loaded.record
        if (len(record.images) == 1) != (self.kind == "likes"):
            self._broken(f"{record.where} is a pair or a list, and no single image with a label")
            return
        usable = [n for n, file in enumerate(loaded.files) if isinstance(file, CheckedImage)]
        for sample in samples_from_record(record, usable, self.kind, self.matches, self.ties):
            shorter = shortened_list(record, sample, self.list_size) if self.list_size else sample
            if shorter is None:
                self.summary.short += 1
                continue
            files = [loaded.files[image] for image in shorter.images]
            whole = [file for file in files if isinstance(file, CheckedImage)]
            if len(whole) == len(files) and self._wanted(shorter, record.text, whole):
                self._count(shorter, record.text, whole)
                yield shorter, record.text, whole

    def _count(self, sample: RecordSample, text: str, files: list[CheckedImage]) -> None:
        """Count a sample that is written."""
        summary = self.summary
        summary.pairs += 1
        summary.sizes.add(*(file.size for file in files))
        summary.transparent += any(file.transparent for file in files)
        summary.long_prompts += exceeds_context(text)
        summary.lengths[len(files)] += 1
        summary.liked += self.kind == "likes" and sample.meta["label"] == 1

    def check_labels(self) -> None:
        """Raise InputError if more labels than a few slips are no probabilities.

        Of a column with another scale, some values would pass, such as 0 for a tie.
        """
        if self.odd_labels.count > ODD_SHARE * self.summary.records:
            raise InputError(
                f"{self.odd_labels.names[0]}; {self._labels()}, and leave the label empty where it "
                "is unknown."
            )

    def _labels(self) -> str:
        """Return which labels to write, for messages."""
        if self.kind == "likes":
            return "write 1 where the image is liked, 0 where it is disliked"
        return "write 1 where the first image is better, 0 where the second is, 0.5 for a tie"

    def _wanted(self, sample: RecordSample, text: str, files: list[CheckedImage]) -> bool:
        """Count a sample and return whether to write it."""
        summary = self.summary
        digests = [file.digest for file in files]
        if len(set(digests)) < len(digests):
            summary.identical += 1
            return False
        summary.ties += sample.tie
        if sample.tie and self.ties == "drop":
            return False
        here, opposed = digests, digests[::-1]
        if self.kind == "likes":
            label = sample.meta["label"]
            here, opposed = ([*digests, bytes([liked])] for liked in (label, 1 - label))
        here_key, opposed_key = (digest(text.encode(), *one) for one in (here, opposed))
        if here_key in self.seen or (sample.tie and opposed_key in self.seen):
            summary.duplicates += 1
            return False
        summary.opposed += opposed_key in self.seen
        summary.kept_ties += sample.tie
        self.seen.add(here_key)
        return True

    def _broken(self, name: str) -> None:
        broken, read = self.summary.broken, self.summary.records
        broken.add(name)
        allowed = max(ALWAYS_ALLOWED, self.broken_share * read) if self.broken_share else 0
        if self.broken_share < 1 and broken.count > allowed:
            raise InputError(
                f"Broken: {broken.count} in the first {read} records, more than the "
                f"{self.broken_share} that `broken_share` allows; repair or remove them: "
                f"{'; '.join(broken.lines())}."
            )
