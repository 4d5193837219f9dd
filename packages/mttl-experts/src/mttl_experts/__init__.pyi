from .artifacts import (
    Artifact as Artifact,
)
from .artifacts import (
    Artifacts as Artifacts,
)
from .compatible import (
    check_compatible as check_compatible,
)
from .compatible import (
    check_fits as check_fits,
)
from .compatible import (
    check_targets as check_targets,
)
from .compatible import (
    check_weights as check_weights,
)
from .compatible import (
    is_other_base as is_other_base,
)
from .errors import (
    ExpertError as ExpertError,
)
from .errors import (
    ExpertExistsError as ExpertExistsError,
)
from .errors import (
    ExpertNotFoundError as ExpertNotFoundError,
)
from .errors import (
    IncompatibleExpertError as IncompatibleExpertError,
)
from .errors import (
    IncompatibleExpertWarning as IncompatibleExpertWarning,
)
from .errors import (
    UnsupportedAdapterError as UnsupportedAdapterError,
)
from .expert import (
    Expert as Expert,
)
from .expert import (
    ExpertInfo as ExpertInfo,
)
from .library import (
    BlobExpertLibrary as BlobExpertLibrary,
)
from .library import (
    ExpertLibrary as ExpertLibrary,
)
from .library import (
    HFExpertLibrary as HFExpertLibrary,
)
from .library import (
    LocalExpertLibrary as LocalExpertLibrary,
)
from .library import (
    VirtualLocalLibrary as VirtualLocalLibrary,
)
from .plain import (
    recipe_digest as recipe_digest,
)
from .scores import (
    Score as Score,
)
from .scores import (
    Scores as Scores,
)
from .selection import (
    check_expert_name as check_expert_name,
)
from .spectral import (
    LoraFactors as LoraFactors,
)
from .spectral import (
    SpectralForm as SpectralForm,
)
from .spectral import (
    inner_product as inner_product,
)
from .spectral import (
    lora_modules as lora_modules,
)
from .spectral import (
    spectral_form as spectral_form,
)
from .spectral import (
    spectral_forms as spectral_forms,
)

__all__ = [
    "Artifact",
    "Artifacts",
    "BlobExpertLibrary",
    "Expert",
    "ExpertError",
    "ExpertExistsError",
    "ExpertInfo",
    "ExpertLibrary",
    "ExpertNotFoundError",
    "HFExpertLibrary",
    "IncompatibleExpertError",
    "IncompatibleExpertWarning",
    "LocalExpertLibrary",
    "LoraFactors",
    "Score",
    "Scores",
    "SpectralForm",
    "UnsupportedAdapterError",
    "VirtualLocalLibrary",
    "check_compatible",
    "check_expert_name",
    "check_fits",
    "check_targets",
    "check_weights",
    "inner_product",
    "is_other_base",
    "lora_modules",
    "recipe_digest",
    "spectral_form",
    "spectral_forms",
]
