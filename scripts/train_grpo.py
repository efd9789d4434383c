"""GRPO with a tracked probe set, for `accelerate launch`; the same as `trl-dynamics grpo`.

One process:    python scripts/train_grpo.py --model_name_or_path embedded --dataset_name embedded \
                    --reward_funcs get_soft_overlong_punishment --probe_set embedded --max_completion_length 32 \
                    --max_steps 20 --bf16 False --output_dir runs/grpo
Eight GPUs:     accelerate launch --config_file recipes/accelerate_configs/zero2.yaml scripts/train_grpo.py \
                    --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/DeepMath-103K \
                    --reward_funcs accuracy_reward --probe_set PROBES --output_dir runs/grpo
"""

import sys

from trl_dynamics.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit(["grpo", *sys.argv[1:]])
