"""A few texts of a corpus, from files spread evenly over the list of inputs."""

from collections.abc import Iterator, Sequence

from megatron_long.corpus.documents import BadDocuments, FileState, RecordKeys, read_documents
from megatron_long.corpus.inputs import InputFile

SAMPLE_FILES = 16
TEXT_CHARS_PER_FILE = 1 << 16


def sample_texts(files: Sequence[InputFile], keys: RecordKeys) -> Iterator[str]:
    """Yield texts from the beginning of some files, always the same ones; bad documents are skipped."""
    count = min(len(files), SAMPLE_FILES)
    chars_per_file = SAMPLE_FILES * TEXT_CHARS_PER_FILE // max(count, 1)
    for index in sorted({number * len(files) // count for number in range(count)}):
        batch = next(read_documents(files[index], keys, BadDocuments(True), FileState()), [])
        size = 0
        for document in batch:
            if size >= chars_per_file:
                break
            yield document.text
            size += min(len(document.text), TEXT_CHARS_PER_FILE)
