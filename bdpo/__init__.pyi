from bdpo.evaluation.in_memory import ModelEvaluation as ModelEvaluation
from bdpo.evaluation.in_memory import evaluate_model as evaluate_model
from bdpo.method.functional import balance_weights as balance_weights
from bdpo.method.functional import bdpo_loss as bdpo_loss
from bdpo.method.mi import mutual_information as mutual_information
from bdpo.scoring.in_memory import ScoredPairs as ScoredPairs
from bdpo.scoring.in_memory import score_pairs as score_pairs

__version__: str
