#!/bin/bash
# Teachers by your own training: one element of the array for each.
#SBATCH --job-name={{name}} --output={{log}}
#SBATCH --requeue --open-mode=append --signal=USR1@{{signal_seconds}}
{{directives}}

{{prologue}}
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself
teachers=({{teachers}})
teacher=${teachers[$SLURM_ARRAY_TASK_ID]}
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
started={{jobs}}/$job.started
touch "$started"

# Until the command listens to signals they are ignored; then it stops after a step and saves.
srun bash -c 'trap "" USR1; exec "$@"' bash \
  {{command}} --only "$teacher"
code=$?

# Put back if this start came further: it wrote a checkpoint. Code 2 is for people to mend.
new=$(find {{training_folder}}/"$teacher"/checkpoints -name 'step_*.pt' -newer "$started" 2>/dev/null)
if [ $code -ne 0 ] && [ $code -ne 2 ] && [ -n "$new" ] \
  && [ "${SLURM_RESTART_COUNT:-0}" -lt {{num_restarts}} ]; then
  scontrol requeue "$job"
fi
rm -f "$started"
exit $code
