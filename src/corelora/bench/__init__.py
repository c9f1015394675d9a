"""What an adapter costs, measured side by side in one process: training steps, start-up, inference, single layers."""
