"""What a run would make of a corpus, from a sample of it, without writing anything to keep."""

import dataclasses
import tempfile
from pathlib import Path

from megatron_long.corpus.listing import OnListing, no_listing
from megatron_long.dataset.manifest import SourceInfo
from megatron_long.mixture.admission import Admission
from megatron_long.mixture.plan import make_plan
from megatron_long.mixture.scaling import scale_source
from megatron_long.mixture.supply import TooLittle
from megatron_long.preprocess.preprocess_config import PreprocessConfig, tokenize_options
from megatron_long.preprocess.publish import disk_errors
from megatron_long.preprocess.survey import survey_corpus
from megatron_long.tokenizer.loading import load_tokenizer

SAMPLE_TEXT_BYTES = 64 << 20


def plan_dataset(
    config: PreprocessConfig,
    text_bytes: int = SAMPLE_TEXT_BYTES,
    on_listing: OnListing = no_listing,
) -> tuple[dict[str, SourceInfo], float]:
    """Tell what `preprocess` would make of each source, from a sample, writing nothing to keep.

    Returns: The sources, counts scaled to the whole corpus; and the share of the corpus that was read.
    """
    listing = config.list_inputs()
    on_listing(listing)
    files, tokenizer = listing.files, load_tokenizer(config.tokenizer, config.engine)
    options = tokenize_options(config, tokenizer)
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        survey = survey_corpus(files, tokenizer, options, Path(scratch) / "tokens", text_bytes)
        tokens = max(round(config.mixture.train_tokens * survey.fraction), 1)
        valid = round(config.mixture.valid_tokens_per_source * survey.fraction)
        mixture = dataclasses.replace(
            config.mixture, train_tokens=tokens, valid_tokens_per_source=valid
        )
        (Path(scratch) / "plan").mkdir()
        try:
            folder = Path(scratch) / "plan"
            plan = make_plan(survey.folders, mixture, Admission(), options.overhead, folder)
        except TooLittle as error:
            asked = config.mixture.train_tokens
            raise TooLittle(asked, *error.counts[1:], survey.fraction) from None
        sources = plan.sources
        if survey.fraction < 1:
            sources = {name: scale_source(info, survey.fraction) for name, info in sources.items()}
    return sources, survey.fraction
