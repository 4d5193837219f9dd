from .artifacts import (
    Artifact as Artifact,
)
from .artifacts import (
    Artifacts as Artifacts,
)
from .card import (
    CardError as CardError,
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
from .difference import (
    ExpertDifference as ExpertDifference,
)
from .difference import (
    ModuleDifference as ModuleDifference,
)
from .difference import (
    difference as difference,
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
from .lineage import (
    Edge as Edge,
)
from .lineage import (
    Lineage as Lineage,
)
from .lineage import (
    Node as Node,
)
from .lineage import (
    Recipe as Recipe,
)
from .lineage import (
    recipe_of as recipe_of,
)
from .logs import (
    Blame as Blame,
)
from .logs import (
    Event as Event,
)
from .logs import (
    ScoreNotFoundError as ScoreNotFoundError,
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
from .search import (
    Likeness as Likeness,
)
from .search import (
    Match as Match,
)
from .search import (
    Search as Search,
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
    distance as distance,
)
from .spectral import (
    inner_product as inner_product,
)
from .spectral import (
    lora_modules as lora_modules,
)
from .spectral import (
    principal_angles as principal_angles,
)
from .spectral import (
    spectral_form as spectral_form,
)
from .spectral import (
    spectral_forms as spectral_forms,
)
from .tensors import (
    unread as unread,
)

__all__ = [
    "Artifact",
    "Artifacts",
    "Blame",
    "BlobExpertLibrary",
    "CardError",
    "Edge",
    "Event",
    "Expert",
    "ExpertDifference",
    "ExpertError",
    "ExpertExistsError",
    "ExpertInfo",
    "ExpertLibrary",
    "ExpertNotFoundError",
    "HFExpertLibrary",
    "IncompatibleExpertError",
    "IncompatibleExpertWarning",
    "Likeness",
    "Lineage",
    "LocalExpertLibrary",
    "LoraFactors",
    "Match",
    "ModuleDifference",
    "Node",
    "Recipe",
    "Score",
    "ScoreNotFoundError",
    "Scores",
    "Search",
    "SpectralForm",
    "UnsupportedAdapterError",
    "VirtualLocalLibrary",
    "check_compatible",
    "check_expert_name",
    "check_fits",
    "check_targets",
    "check_weights",
    "difference",
    "distance",
    "inner_product",
    "is_other_base",
    "lora_modules",
    "principal_angles",
    "recipe_digest",
    "recipe_of",
    "spectral_form",
    "spectral_forms",
    "unread",
]
