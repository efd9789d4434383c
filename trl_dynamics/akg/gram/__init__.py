"""gram: all inner products of observers' and updates' gradients, exact, within a memory budget.

products.py is the entry. plan.py cuts both sides into tiles and says what they will take, tiles.py runs them,
record.py collects the uses of every parameter in one forward and backward, uses.py and pairs.py multiply them,
journal.py keeps finished tiles. This folder imports the flat files of akg/.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.akg.gram.plan import estimate
    from trl_dynamics.akg.gram.products import GramResult, gram, loss_weights

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {"GramResult": "products", "estimate": "plan", "gram": "products", "loss_weights": "products"},
)
