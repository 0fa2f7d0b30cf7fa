#!/usr/bin/env bash
# Print the manifests that train on a Kubernetes cluster (1.31 or later): an Indexed Job with one pod per node, and
# the headless Service through which its pods find the first one.
# usage: launch/kubernetes/render_job.sh CONFIG [section.field=value ...] | kubectl apply -f -
# CONFIG and the paths in it are those inside of the volume. Variables of the cluster, with their defaults in parentheses:
#   RUN_ID               the name of the Job and the Service, required
#   VOLUME_CLAIM         the claim of a volume that all nodes can write (ReadWriteMany), mounted at /work; required
#   IMAGE                the image, which the cluster can pull (sas-megatron:gpu)
#   NNODES               the number of pods (1)
#   GPUS_PER_NODE        the number of GPUs, and of processes, of each pod (8)
#   GPU_RESOURCE         the resource of the GPUs (nvidia.com/gpu); empty: processes on CPUs
#   INFINIBAND_RESOURCE  the resource of the InfiniBand devices, such as rdma/hca_shared_devices_a (none)
#   SHARED_MEMORY        the size of /dev/shm, through which the processes of a pod exchange data (16Gi)
#   GRACE_SECONDS        how long a pod that is evicted may take to save (180)
#   JOIN_SECONDS         how long pods wait for each other (600)
#   MAX_RESTARTS         how often the pods are started again after a failure (3); lost nodes do not count
#   MASTER_PORT          the port on which the first pod listens (29500)
set -euo pipefail
# shellcheck source=launch/cluster_variables.sh
source "$(dirname "${BASH_SOURCE[0]}")/../cluster_variables.sh"
if [ $# -lt 1 ]; then print_usage "$0"; exit 2; fi
require_variable RUN_ID 'it names the Job'
require_variable VOLUME_CLAIM 'it is the claim of the volume that all pods share'
name='[a-z0-9]([-a-z0-9]*[a-z0-9])?'
number='[1-9][0-9]*'
check_variable RUN_ID "$RUN_ID" "[a-z]([-a-z0-9]{0,50}[a-z0-9])?" 'a name of lower-case letters, digits and -'
check_variable VOLUME_CLAIM "$VOLUME_CLAIM" "$name([.]$name)*" 'the name of a PersistentVolumeClaim'
nodes=${NNODES:-1} gpus=${GPUS_PER_NODE:-8} grace=${GRACE_SECONDS:-180} join=${JOIN_SECONDS:-600}
restarts=${MAX_RESTARTS:-3} port=${MASTER_PORT:-29500} shared_memory=${SHARED_MEMORY:-16Gi}
image=${IMAGE:-sas-megatron:gpu} gpu_resource=${GPU_RESOURCE-nvidia.com/gpu} infiniband=${INFINIBAND_RESOURCE:-}
check_variable NNODES "$nodes" "$number" 'the number of pods; a Job cannot change it while it runs'
check_variable GPUS_PER_NODE "$gpus" "$number" 'the number of processes per pod'
check_variable GRACE_SECONDS "$grace" "[4-9][0-9]|[1-9][0-9]{2,}" 'at least 40 seconds'
check_variable JOIN_SECONDS "$join" "$number" 'a number of seconds'
check_variable MAX_RESTARTS "$restarts" '[0-9]+' 'the number of restarts'
check_variable MASTER_PORT "$port" "$number" 'a port'
check_variable SHARED_MEMORY "$shared_memory" "$number([KMGT]i?)?" 'a quantity such as 16Gi'
check_variable IMAGE "$image" '[^[:space:]"]+' 'an image'
resource="[a-z0-9.-]+/[A-Za-z0-9._-]+"
check_variable GPU_RESOURCE "$gpu_resource" "($resource)?" 'a resource such as nvidia.com/gpu'
check_variable INFINIBAND_RESOURCE "$infiniband" "($resource)?" 'a resource such as rdma/hca_shared_devices_a'

# quote TEXT: print a string of YAML. Kubernetes would expand $(VARIABLE) in arguments.
quote() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//\$(/\$\$(}"
}

argument_lines=''
for argument in "$@"; do argument_lines+="            - $(quote "$argument")"$'\n'; done
limits=''
if [ -n "$gpu_resource" ]; then limits+="$gpu_resource: $gpus, "; fi
# RDMA pins memory, for which a container needs this capability.
capabilities=''
if [ -n "$infiniband" ]; then
  limits+="$infiniband: 1"
  capabilities=$'\n              add: [IPC_LOCK]'
fi
cat <<EOF
apiVersion: v1
kind: Service
metadata:
  name: $RUN_ID
spec:
  clusterIP: None
  # The pods find the first one before it is ready.
  publishNotReadyAddresses: true
  selector:
    batch.kubernetes.io/job-name: $RUN_ID
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $RUN_ID
spec:
  completionMode: Indexed
  completions: $nodes
  parallelism: $nodes
  # All pods fail together.
  backoffLimit: $((restarts * nodes))
  podFailurePolicy:
    rules:
      # A pod of a run that saved and stopped (75), or of a node that was drained or lost, is replaced.
      - action: Ignore
        onExitCodes: {containerName: train, operator: In, values: [75]}
      - action: Ignore
        onPodConditions:
          - {type: DisruptionTarget, status: "True"}
      # The config is refused: another start would not help.
      - action: FailJob
        onExitCodes: {containerName: train, operator: In, values: [2]}
  template:
    spec:
      # Names the pods $RUN_ID-0.$RUN_ID and so on.
      subdomain: $RUN_ID
      restartPolicy: Never
      terminationGracePeriodSeconds: $grace
      securityContext: {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000}
      containers:
        - name: train
          image: "$image"
          command: [/opt/sas_megatron/launch/kubernetes/run_pod.sh]
          args:
${argument_lines%$'\n'}
          workingDir: /work
          env:
            - {name: RUN_ID, value: "$RUN_ID"}
            - {name: NNODES, value: "$nodes"}
            - {name: GPUS_PER_NODE, value: "$gpus"}
            - {name: MASTER_ADDR, value: "$RUN_ID-0.$RUN_ID"}
            - {name: MASTER_PORT, value: "$port"}
            - {name: JOIN_SECONDS, value: "$join"}
            - {name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, value: "$((grace - 30))"}
            - name: NODE_RANK
              valueFrom:
                fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
          resources:
            limits: {${limits%, }}
          securityContext:
            allowPrivilegeEscalation: false
            capabilities:
              drop: [ALL]$capabilities
          volumeMounts:
            - {name: work, mountPath: /work}
            - {name: shared-memory, mountPath: /dev/shm}
      volumes:
        - name: work
          persistentVolumeClaim: {claimName: $VOLUME_CLAIM}
        - name: shared-memory
          emptyDir: {medium: Memory, sizeLimit: $shared_memory}
EOF
