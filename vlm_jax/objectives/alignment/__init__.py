"""Terms that align what a model sees: matching of pairs, distillation from teachers."""
