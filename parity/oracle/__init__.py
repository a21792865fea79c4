"""The third implementation: naive, in NumPy float64, on one rank, with the error it predicts for the other two."""

from parity.oracle.activation import activate as activate
from parity.oracle.layer import Reference as Reference
from parity.oracle.layer import reference as reference
from parity.oracle.lessons import teach as teach
from parity.oracle.router import Routing as Routing
from parity.oracle.router import route as route
