from .dense import (
    export_dense as export_dense,
)
from .found import (
    Found as Found,
)
from .found import (
    FoundExpert as FoundExpert,
)
from .gguf_lora import (
    export_gguf as export_gguf,
)
from .importing import (
    ImportPlan as ImportPlan,
)
from .importing import (
    choose as choose,
)
from .importing import (
    find_experts as find_experts,
)
from .importing import (
    plan_import as plan_import,
)
from .importing import (
    renamed as renamed,
)
from .importing import (
    run_import as run_import,
)
from .plain_library import (
    PlainExpertLibrary as PlainExpertLibrary,
)

__all__ = [
    "Found",
    "FoundExpert",
    "ImportPlan",
    "PlainExpertLibrary",
    "choose",
    "export_dense",
    "export_gguf",
    "find_experts",
    "plan_import",
    "renamed",
    "run_import",
]
