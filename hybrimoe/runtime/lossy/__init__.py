"""The runtime's part of lossy policies: what runs when a result may differ from the exact one."""
