"""What a deployment should take and cost: cards, sizing, roofline, cost, recorded runs."""

from helpers import face

__getattr__, __all__ = face(
    __name__,
    {
        "advise": "Advice explorer",
        "cards": "CARDS Card SizingError card",
        "options": "Option",
        "sizing": "Budget Load reconcile",
        "cost": "CostError Offer offers recommend",
        "claims": "findings",
        "counting": "Counted counted",
    },
)
