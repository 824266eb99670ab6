"""Rules that compute the step size η from what an update sees: the loss, the gradient, the past.

θ parameters, f the objective on the examples of the update, d its gradient, η the step size, t the
number of updates made before this one, T the number planned, B examples per update, N in all.

    f = J(θ) + ½λ‖θ‖²,    d = ∇J(θ) + λθ        λ the weight decay: a rule sees both with it
    η = rule(θ, f, d, …),    θ ← θ − η d

| rule | η | looks elsewhere | B < N |
| --- | --- | --- | --- |
| `Armijo` | the first that decreases f enough, found by shrinking | f at the trial points | no |
| `BarzilaiBorwein` | ⟨s,s⟩/⟨s,y⟩ of the last step, safeguarded | f at the trial points | no |
| `Polyak` | (f − f*)/‖d‖² | | no |
| `StochasticPolyak` | min(η_max, (f − f*)/(c‖d‖²)) | | yes |
| `StochasticLineSearch` | as Armijo, on the batch at hand | f at the trial points | yes |
| `DoG` | max‖θ−θ₀‖ / √Σ‖d‖² | | yes |
| `DoWG` | max‖θ−θ₀‖² / √Σ max‖θ−θ₀‖²‖d‖² | | yes |
| `PolyakDoG` | as `DoG`, in units of Polyak's step; at most 1.5 (f − f*)/‖d‖² | | yes |
| `InverseSmoothness` | 1/L | gradients near θ | where L is given |
| `ScheduleFree` | another rule's, or lr; averages θ | as that rule | as that rule |

An optimizer takes a rule as `step_size=` and leaves lr to it. A schedule may still scale what the
rule gives. A rule object holds its options only: what it remembers is the optimizer's state, and
is saved with it (`Memory`). At each update it gets an immutable `Context` and returns η; what else
it needs, and where it does not hold, is said in its `Needs`. An option out of its range is a
ValueError.
"""

from gdtrain.step_sizes.automatic import PolyakDoG, automatic
from gdtrain.step_sizes.averaging import ScheduleFree
from gdtrain.step_sizes.barzilai_borwein import BarzilaiBorwein
from gdtrain.step_sizes.base import Needs, StepSize
from gdtrain.step_sizes.context import Context, Evaluations, Memory
from gdtrain.step_sizes.distance import DoG, DoWG
from gdtrain.step_sizes.line_search import Armijo, StochasticLineSearch
from gdtrain.step_sizes.polyak import Polyak, StochasticPolyak
from gdtrain.step_sizes.smoothness import InverseSmoothness

__all__ = [
    "Armijo",
    "BarzilaiBorwein",
    "Context",
    "DoG",
    "DoWG",
    "Evaluations",
    "InverseSmoothness",
    "Memory",
    "Needs",
    "Polyak",
    "PolyakDoG",
    "ScheduleFree",
    "StepSize",
    "StochasticLineSearch",
    "StochasticPolyak",
    "automatic",
]
