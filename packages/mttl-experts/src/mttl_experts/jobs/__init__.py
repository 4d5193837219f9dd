"""What a job needs around it when it runs as a command line: options, progress, a record.

For apps; it needs the extra ``mttl-experts[jobs]`` (click and rich), and nothing else in this
package imports it.
"""

from mttl_experts.jobs.command import JobCommand, known_errors
from mttl_experts.jobs.pairs import key_values, weights_of
from mttl_experts.jobs.progress import bar, console, say
from mttl_experts.jobs.record import write_json
from mttl_experts.jobs.scoring import TWO_SHOT, Scoring, mean, percent

__all__ = [
    "TWO_SHOT",
    "JobCommand",
    "Scoring",
    "bar",
    "console",
    "key_values",
    "known_errors",
    "mean",
    "percent",
    "say",
    "weights_of",
    "write_json",
]
