-- Run by PostgreSQL's image when its volume is new; POSTGRES_DB makes `mlflow` itself.
CREATE DATABASE mlflow_auth;
