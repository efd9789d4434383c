"""DPO with a tracked probe set, for `accelerate launch`; the same as `trl-dynamics dpo`.

One process:    python scripts/train_dpo.py --config recipes/quickstart/dpo.yaml \
                    --model_name_or_path embedded --output_dir runs/dpo
Eight GPUs:     accelerate launch --config_file recipes/accelerate_configs/zero2.yaml scripts/train_dpo.py \
                    --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized \
                    --probe_set PROBES --output_dir runs/dpo
"""

import sys

from trl_dynamics.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit(["dpo", *sys.argv[1:]])
