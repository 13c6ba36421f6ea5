#!/bin/sh
# MLflow's server with users, over TLS, runs in PostgreSQL, artifacts in S3. From the environment:
#   POSTGRES_HOST, POSTGRES_USER, POSTGRES_PASSWORD   databases `mlflow` and `mlflow_auth` are there
#   MLFLOW_ARTIFACTS                 s3://BUCKET/mlflow
#   MLFLOW_ALLOWED_HOSTS             names that clients may call it by, ports with them
#   MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD, MLFLOW_FLASK_SERVER_SECRET_KEY
#   MLFLOW_TLS                       folder with tls.crt and tls.key; default: /tls, for a container
#   MLFLOW_HOST, MLFLOW_PORT         default: 0.0.0.0:5000, for a container
set -eu
for name in POSTGRES_HOST POSTGRES_USER POSTGRES_PASSWORD MLFLOW_ARTIFACTS MLFLOW_ALLOWED_HOSTS \
    MLFLOW_AUTH_ADMIN_USERNAME MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY; do
    eval "value=\${$name:-}"
    [ -n "$value" ] || { echo "error: $name is not set" >&2; exit 2; }
done
case $POSTGRES_PASSWORD in
    *[!A-Za-z0-9_-]*) echo "error: POSTGRES_PASSWORD: letters, digits, - and _ only" >&2; exit 2 ;;
esac
tls=${MLFLOW_TLS:-/tls}
for file in tls.crt tls.key; do
    [ -r "$tls/$file" ] || {
        echo "error: $tls/$file: not there, or not for this user; infra/mlflow/certificate.sh makes one" >&2
        exit 2
    }
done

server="postgresql+psycopg2://$POSTGRES_USER:$POSTGRES_PASSWORD@$POSTGRES_HOST"
umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
sed "s|\${MLFLOW_AUTH_DATABASE_URI}|$server/mlflow_auth|" \
    "$(dirname "$0")/basic_auth.ini" > "$MLFLOW_AUTH_CONFIG_PATH"
# The server's options by environment: what stands on a command line, `ps` shows to all.
export MLFLOW_AUTH_CONFIG_PATH MLFLOW_BACKEND_STORE_URI="$server/mlflow"

exec mlflow server --app-name basic-auth --workers 2 \
    --uvicorn-opts "--ssl-certfile '$tls/tls.crt' --ssl-keyfile '$tls/tls.key'" \
    --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" \
    --artifacts-destination "$MLFLOW_ARTIFACTS" --allowed-hosts "$MLFLOW_ALLOWED_HOSTS"
