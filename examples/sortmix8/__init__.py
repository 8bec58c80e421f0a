"""sortmix8: sort eight letters; the smallest task on which a mixture of experts visibly learns."""
