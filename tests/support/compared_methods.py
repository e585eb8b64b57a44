"""The methods that are compared unless told otherwise; the others have test files of their own."""

from clipmapper.relevance import COMPARED
from clipmapper.relevance import METHODS as ALL_METHODS

METHODS = {name: ALL_METHODS[name] for name in COMPARED}
