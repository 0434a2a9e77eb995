"""The verdict: statistics, rules, and the claims of the paper."""
