"""What libraries log, and how much of it reaches the terminal."""

import logging as python_logging
import os
import sys
from typing import Any

from absl import logging


def quiet() -> None:
    """Keeps the start-up chatter of TensorFlow, oneDNN and XLA off the terminal; a value the user has set is kept."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Without torch or tensorflow, `transformers` prints advice that has nothing to do with its tokenizers.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def errors_only() -> None:
    """Has libraries log errors alone, each of them once: they narrate at INFO, and warn of what no user has done."""
    logging.set_verbosity(logging.ERROR)
    logging.get_absl_logger().addFilter(_is_news)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)  # the same errors once more
    sys.unraisablehook = _tell_unraisable


def _is_news(record: Any) -> bool:
    """Whether a log record is not of an error that is raised as well: Orbax and clu log those of their threads."""
    return not (record.exc_info and any(f"/{library}/" in record.pathname for library in ("orbax", "clu")))


def _tell_unraisable(unraisable: Any) -> None:
    """`sys.unraisablehook`: TensorStore's threads find Orbax gone after the first error of a save, which is raised."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
