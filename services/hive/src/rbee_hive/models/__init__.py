"""The hive's models: what lies here, how more comes here, and how others get it from here.

`catalogue` looks at the disk, `downloads` shares transfers among those who ask, `transfer` brings one model,
`fetch` one file of it, from `hub` or `peers`, into `staging`. Names from outside pass `names` first.
"""

from rbee_hive.models.catalogue import WEIGHT_SUFFIXES, Models, users_by_model
from rbee_hive.models.downloads import Downloads
from rbee_hive.models.handlers import ModelHandlers
from rbee_hive.models.hub import HubAccess, UnusableHub, read_hub_access
from rbee_hive.models.peers import QueenPeers
from rbee_hive.models.routes import model_routes
from rbee_hive.models.source import NoPeers, Patience, Peers

__all__ = [
    "WEIGHT_SUFFIXES",
    "Downloads",
    "HubAccess",
    "ModelHandlers",
    "Models",
    "NoPeers",
    "Patience",
    "Peers",
    "QueenPeers",
    "UnusableHub",
    "model_routes",
    "read_hub_access",
    "users_by_model",
]
