"""After pretraining: problems whose answers can be checked, and the rewards for solving them."""
