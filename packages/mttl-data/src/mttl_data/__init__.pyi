from .batches import (
    Batches as Batches,
)
from .batches import (
    collate as collate,
)
from .benchmarks import (
    BENCHMARKS as BENCHMARKS,
)
from .benchmarks import (
    BenchmarkScore as BenchmarkScore,
)
from .benchmarks import (
    benchmark_names as benchmark_names,
)
from .benchmarks import (
    check_benchmarks as check_benchmarks,
)
from .benchmarks import (
    evaluate_benchmarks as evaluate_benchmarks,
)
from .dataset_library import (
    DatasetLibrary as DatasetLibrary,
)
from .dataset_library import (
    TaskInfo as TaskInfo,
)
from .errors import (
    DataError as DataError,
)
from .errors import (
    DataNotReachableError as DataNotReachableError,
)
from .errors import (
    EmptyTaskError as EmptyTaskError,
)
from .errors import (
    OtherRowsWarning as OtherRowsWarning,
)
from .errors import (
    PromptError as PromptError,
)
from .errors import (
    RowsError as RowsError,
)
from .errors import (
    TaskExistsError as TaskExistsError,
)
from .errors import (
    TruncationWarning as TruncationWarning,
)
from .errors import (
    UnknownTaskError as UnknownTaskError,
)
from .evaluate import (
    TaskScore as TaskScore,
)
from .evaluate import (
    evaluate_task as evaluate_task,
)
from .evaluate import (
    generate_answers as generate_answers,
)
from .evaluate import (
    greedy as greedy,
)
from .flan import (
    EVALUATION_OVERLAP as EVALUATION_OVERLAP,
)
from .flan import (
    clean_name as clean_name,
)
from .flan import (
    make_flan as make_flan,
)
from .forward import (
    context_length as context_length,
)
from .held_out_rows import (
    HeldOut as HeldOut,
)
from .held_out_rows import (
    held_out as held_out,
)
from .likelihood import (
    Likelihood as Likelihood,
)
from .likelihood import (
    likelihoods as likelihoods,
)
from .metrics import (
    METRICS as METRICS,
)
from .metrics import (
    Interval as Interval,
)
from .metrics import (
    Metric as Metric,
)
from .metrics import (
    mean_interval as mean_interval,
)
from .metrics import (
    score_answers as score_answers,
)
from .opening import (
    STARTER_LIBRARY as STARTER_LIBRARY,
)
from .opening import (
    open_dataset as open_dataset,
)
from .prompts import (
    ANSWER_ONLY as ANSWER_ONLY,
)
from .prompts import (
    Example as Example,
)
from .prompts import (
    Prompt as Prompt,
)
from .prompts import (
    PromptWriter as PromptWriter,
)
from .prompts import (
    Truncation as Truncation,
)
from .prompts import (
    end_token_id as end_token_id,
)
from .prompts import (
    truncation as truncation,
)
from .rows import (
    SPLITS as SPLITS,
)
from .rows import (
    Row as Row,
)
from .starter import (
    STARTER_SIZES as STARTER_SIZES,
)
from .starter import (
    STARTER_TASKS as STARTER_TASKS,
)
from .starter import (
    StarterTask as StarterTask,
)
from .starter import (
    make_starter as make_starter,
)
from .starter import (
    starter_rows as starter_rows,
)

__all__ = [
    "ANSWER_ONLY",
    "BENCHMARKS",
    "EVALUATION_OVERLAP",
    "METRICS",
    "SPLITS",
    "STARTER_LIBRARY",
    "STARTER_SIZES",
    "STARTER_TASKS",
    "Batches",
    "BenchmarkScore",
    "DataError",
    "DataNotReachableError",
    "DatasetLibrary",
    "EmptyTaskError",
    "Example",
    "HeldOut",
    "Interval",
    "Likelihood",
    "Metric",
    "OtherRowsWarning",
    "Prompt",
    "PromptError",
    "PromptWriter",
    "Row",
    "RowsError",
    "StarterTask",
    "TaskExistsError",
    "TaskInfo",
    "TaskScore",
    "Truncation",
    "TruncationWarning",
    "UnknownTaskError",
    "benchmark_names",
    "check_benchmarks",
    "clean_name",
    "collate",
    "context_length",
    "end_token_id",
    "evaluate_benchmarks",
    "evaluate_task",
    "generate_answers",
    "greedy",
    "held_out",
    "likelihoods",
    "make_flan",
    "make_starter",
    "mean_interval",
    "open_dataset",
    "score_answers",
    "starter_rows",
    "truncation",
]
