"""The methods: one documented point of the product space each.

The axes that every method shares (``sites``, ``dropout``, ``base``, ``lr``, ``ranks``, ``init``,
``solver``, ``penalties``) pass through ``**axes`` to :class:`rankwise.Recipe`.
"""

from rankwise.recipes import (
    allocation,
    augmented,
    compositions,
    pretraining,
    projected,
    ranking,
    regularised,
    rotating,
    sharing,
    solving,
    spectral_domain,
    starts,
    structures,
    tensors,
    threefactor,
)
from rankwise.recipes.allocation import *  # noqa: F403
from rankwise.recipes.augmented import *  # noqa: F403
from rankwise.recipes.compositions import *  # noqa: F403
from rankwise.recipes.pretraining import *  # noqa: F403
from rankwise.recipes.projected import *  # noqa: F403
from rankwise.recipes.ranking import *  # noqa: F403
from rankwise.recipes.regularised import *  # noqa: F403
from rankwise.recipes.rotating import *  # noqa: F403
from rankwise.recipes.sharing import *  # noqa: F403
from rankwise.recipes.solving import *  # noqa: F403
from rankwise.recipes.spectral_domain import *  # noqa: F403
from rankwise.recipes.starts import *  # noqa: F403
from rankwise.recipes.structures import *  # noqa: F403
from rankwise.recipes.tensors import *  # noqa: F403
from rankwise.recipes.threefactor import *  # noqa: F403

__all__: list[str] = []
__all__ += structures.__all__
__all__ += augmented.__all__
__all__ += rotating.__all__
__all__ += spectral_domain.__all__
__all__ += threefactor.__all__
__all__ += sharing.__all__
__all__ += tensors.__all__
__all__ += starts.__all__
__all__ += solving.__all__
__all__ += projected.__all__
__all__ += ranking.__all__
__all__ += allocation.__all__
__all__ += regularised.__all__
__all__ += pretraining.__all__
__all__ += compositions.__all__
