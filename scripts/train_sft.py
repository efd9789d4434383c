"""SFT with a tracked probe set, for `accelerate launch`; the same as `trl-dynamics sft`.

One process:    python scripts/train_sft.py --config recipes/quickstart/sft.yaml --output_dir runs/sft
Eight GPUs:     accelerate launch --config_file recipes/accelerate_configs/zero2.yaml scripts/train_sft.py \
                    --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized \
                    --probe_set PROBES --output_dir runs/sft
"""

import sys

from trl_dynamics.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit(["sft", *sys.argv[1:]])
