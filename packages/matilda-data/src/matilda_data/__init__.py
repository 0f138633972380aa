"""Text to verified uint16 token shards, and resumable, elastic streams over them."""

from matilda_data.binfiles import open_bin
from matilda_data.blobs import SOFTWARE_HERITAGE
from matilda_data.command_line import add_preparation_options, parse_weights, run_preparation
from matilda_data.dataset import TokenDataset, open_dataset
from matilda_data.errors import DataError
from matilda_data.hub import HubSource, prepare_hub
from matilda_data.manifest import Manifest, ShardEntry, SourceEntry
from matilda_data.overlap import measure_overlap
from matilda_data.packing import PackedRows
from matilda_data.persistence import Retry
from matilda_data.prefetch import Prefetcher
from matilda_data.prepare import TextSource, prepare_text
from matilda_data.progress import Progress
from matilda_data.provenance import DocumentSpan, documents_of, sources_of
from matilda_data.stream import BinStream, batch_sha256, cu_seqlens
from matilda_data.terminal import ProgressLine
from matilda_data.tokenizer import Tokenizer, load_tokenizer
from matilda_data.transformers_files import transformers_files
from matilda_data.verify import VerifyReport, verify

__all__ = [
    "SOFTWARE_HERITAGE",
    "BinStream",
    "DataError",
    "DocumentSpan",
    "HubSource",
    "Manifest",
    "PackedRows",
    "Prefetcher",
    "Progress",
    "ProgressLine",
    "Retry",
    "ShardEntry",
    "SourceEntry",
    "TextSource",
    "TokenDataset",
    "Tokenizer",
    "VerifyReport",
    "add_preparation_options",
    "batch_sha256",
    "cu_seqlens",
    "documents_of",
    "load_tokenizer",
    "measure_overlap",
    "open_bin",
    "open_dataset",
    "parse_weights",
    "prepare_hub",
    "prepare_text",
    "run_preparation",
    "sources_of",
    "transformers_files",
    "verify",
]
