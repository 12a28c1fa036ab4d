"""What a deployment should take and cost: cards, sizing, roofline, cost, recorded runs."""
