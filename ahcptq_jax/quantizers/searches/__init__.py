"""Searches for quantizer parameters: ranges, weight ranges, the HLUQ breakpoint, AGQ's tau and scale.

Calibration streams batches, so every activation search is a pure ``init / update / finalize`` over a small state, and
``search_*`` runs the three over an iterable. Statistics are float32 and every function is deterministic. The weight and
softmax losses are the official ``mean |error|^2.4``.
"""

from ahcptq_jax.quantizers.searches.batches import summed as summed
from ahcptq_jax.quantizers.searches.hybrid import HybridSearch as HybridSearch
from ahcptq_jax.quantizers.searches.hybrid import HybridState as HybridState
from ahcptq_jax.quantizers.searches.hybrid import hybrid_candidates as hybrid_candidates
from ahcptq_jax.quantizers.searches.hybrid import hybrid_finalize as hybrid_finalize
from ahcptq_jax.quantizers.searches.hybrid import hybrid_init as hybrid_init
from ahcptq_jax.quantizers.searches.hybrid import hybrid_of_batch as hybrid_of_batch
from ahcptq_jax.quantizers.searches.hybrid import search_hybrid as search_hybrid
from ahcptq_jax.quantizers.searches.hybrid import search_hybrid_table as search_hybrid_table
from ahcptq_jax.quantizers.searches.ranges import RangeState as RangeState
from ahcptq_jax.quantizers.searches.ranges import range_init as range_init
from ahcptq_jax.quantizers.searches.ranges import range_update as range_update
from ahcptq_jax.quantizers.searches.ranges import search_range as search_range
from ahcptq_jax.quantizers.searches.ranges import search_uniform as search_uniform
from ahcptq_jax.quantizers.searches.ranges import uniform_mse_update as uniform_mse_update
from ahcptq_jax.quantizers.searches.softmax import SoftmaxState as SoftmaxState
from ahcptq_jax.quantizers.searches.softmax import search_softmax as search_softmax
from ahcptq_jax.quantizers.searches.softmax import softmax_finalize as softmax_finalize
from ahcptq_jax.quantizers.searches.softmax import softmax_init as softmax_init
from ahcptq_jax.quantizers.searches.softmax import softmax_update as softmax_update
from ahcptq_jax.quantizers.searches.weights import WeightSearch as WeightSearch
from ahcptq_jax.quantizers.searches.weights import search_weight as search_weight
from ahcptq_jax.quantizers.searches.weights import search_weight_ranges as search_weight_ranges
