"""What is learned from and judged on: flow pairs, labelled sets, synthetic videos, maps."""
