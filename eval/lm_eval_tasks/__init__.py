"""lm-eval's task files of the VQA benchmarks; `unitok lm-eval` adds this folder to lm-eval's own tasks."""
