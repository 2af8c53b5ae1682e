"""Mixed precision: widths of each layer and site, chosen so that the model's output suffers least within a budget."""

from ahcptq_jax.mixed.budget import COSTS as COSTS
from ahcptq_jax.mixed.budget import Budget as Budget
from ahcptq_jax.mixed.budget import parse_budget as parse_budget
from ahcptq_jax.mixed.choose import choose_widths as choose_widths
